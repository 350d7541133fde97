"""Environments with spaces of every kind: they show random observations and note what they were given."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text

VECTOR = Box(-1, 1, (3,))
PICTURE = Box(0, 255, (40, 44, 3), np.uint8)
PICTURE_AND_VECTOR = Dict(camera=PICTURE, speed=Box(-1, 1, (2, 2)), gear=Discrete(3, start=1))
GRID = MultiDiscrete([[2, 3], [4, 2]], start=[[1, -1], [0, 5]])
SWITCHES = MultiBinary([2, 3])
MOTORS = Box(np.array([-1, -2, 0]), np.array([1, 2, np.inf]), dtype=np.float64)


class SpacesEnv(gym.Env):
    """Episodes of five steps; an action outside the space, also in shape or type, is an error.

    Args:
        observation_space: its samples are the observations.
        action_space: of the actions.
    """

    def __init__(self, observation_space: gym.Space = VECTOR, action_space: gym.Space | None = None) -> None:
        self.observation_space, self.action_space = observation_space, action_space or Discrete(2)
        self.shown: list[Any] = []
        self.received: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.received.append(np.array(action))
        self.steps += 1
        return self._observe(), self.np_random.normal(), False, self.steps == 5, {}

    def _observe(self) -> Any:
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]


for name, kwargs in {
    "Vector-v0": {},
    "PictureAndVector-v0": {"observation_space": PICTURE_AND_VECTOR},
    "Grid-v0": {"action_space": GRID},
    "Switches-v0": {"action_space": SWITCHES},
    "Motors-v0": {"action_space": MOTORS},
    "Words-v0": {"observation_space": Text(5)},
    "Counts-v0": {"action_space": Box(0, 9, (2,), np.int64)},
}.items():
    gym.register(name, entry_point="tests.spaces_env:SpacesEnv", kwargs=kwargs)
