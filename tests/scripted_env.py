"""An environment whose episodes are written down, so that what a rollout must hold can be worked out by hand."""

from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np


class Episode(NamedTuple):
    rewards: tuple[float, ...]  # one for each step
    end: Literal["terminated", "truncated", "both"]


SCRIPT = (
    Episode((1.0, 2.0, 3.0), "terminated"),
    Episode((4.0, 5.0), "truncated"),
    Episode((6.0,), "both"),
    Episode((7.0, 8.0, 9.0, 10.0), "truncated"),
)


class ScriptedEnv(gym.Env):
    """Plays the episodes of a script in turn, over and over, whatever the actions.

    The observation is [number of the episode, steps taken in it] + offset.

    Args:
        script: the episodes.
        by_seed: whether the seed of a reset chooses the episode, `seed % len(script)`, instead of its turn.
        shape: of the observations, two numbers in all.
        dtype: of the observations.
        offset: is added to the observations.
    """

    def __init__(
        self,
        script: tuple[Episode, ...] = SCRIPT,
        by_seed: bool = False,
        shape: tuple[int, ...] = (2,),
        dtype: type[np.floating] = np.float32,
        offset: float = 0.0,
    ) -> None:
        self.script, self.by_seed, self.offset = script, by_seed, offset
        self.observation_space = gym.spaces.Box(0, np.inf, shape, dtype)
        self.action_space = gym.spaces.Discrete(2)
        self.episode = -1
        self.steps = 0
        self.received: list[int] = []  # all actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode = seed % len(self.script) if self.by_seed else self.episode + 1
        self.steps = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.received.append(int(action))
        rewards, end = self.script[self.episode % len(self.script)]
        reward = rewards[self.steps]
        self.steps += 1
        ended = self.steps == len(rewards)
        return self._observe(), reward, ended and end != "truncated", ended and end != "terminated", {}

    def _observe(self) -> np.ndarray:
        space = self.observation_space
        return (np.array([self.episode, self.steps]) + self.offset).astype(space.dtype).reshape(space.shape)


for name, kwargs in {
    "Scripted-v0": {},
    "ScriptedBySeed-v0": {"by_seed": True},
    "ScriptedMatrix-v0": {"shape": (2, 1)},
    "ScriptedFloat64-v0": {"dtype": np.float64, "offset": 0.1},  # float32 cannot hold 0.1
}.items():
    gym.register(name, entry_point="tests.scripted_env:ScriptedEnv", kwargs=kwargs)
