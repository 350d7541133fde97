"""Environments that are hard to put back where they were, each for a reason of its own.

`--env-id tests.hard_envs:Float64-v0` names one where the repository is on `sys.path`, as it is for the scripts.

The first three repeat their episodes, in their own way, so a run with them must go on exactly:

- Float64-v0: observations and state have more digits than float32 holds.
- SeededOnce-v0: a generator of its own, which only a reset with a seed makes anew.
- SameArray-v0: every observation is the same array, changed in place.

The others do not, so a run with them can only go on with new episodes:

- Unrepeatable-v0: noise from the system in the observations.
- UnrepeatableReward-v0: the observations repeat, but there is noise from the system in the rewards.
- LivesOn-v0: observations and rewards depend on how often the environment was reset before.
"""

import os
from typing import Any

import gymnasium as gym
import numpy as np

SHORTEST, LONGEST = 20, 200  # steps of an episode


class Walk(gym.Env):
    """A point on a line, pushed by the action and by noise; it is to stay near 0.

    An episode terminates when the point has gone too far. After a number of steps that its reset draws it is truncated.
    """

    dtype: type[np.floating] = np.float32

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), self.dtype)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    @property
    def random(self) -> np.random.Generator:
        """Where all random numbers come from."""
        return self.np_random

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        self.limit = self.random.integers(SHORTEST, LONGEST + 1)
        self.place, self.speed = self.random.normal(0, 0.1, 2)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.speed += 0.1 * float(action[0]) + self.random.normal(0, 0.05)
        self.place += 0.1 * self.speed
        terminated = bool(abs(self.place) > 1 and self.steps >= SHORTEST)
        return self.observe(), self.reward(), terminated, bool(self.steps == self.limit), {}

    def observe(self) -> np.ndarray:
        return np.array([self.place, self.speed, self.steps / LONGEST], self.dtype)

    def reward(self) -> float:
        return 1 - abs(self.place)


class Float64(Walk):
    dtype = np.float64


class SeededOnce(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng()

    @property
    def random(self) -> np.random.Generator:
        return self.rng

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        return super().reset()  # without the seed, so `np_random` is never seeded


class SameArray(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation = np.zeros(3, np.float32)

    def observe(self) -> np.ndarray:
        self.observation[:] = super().observe()
        return self.observation


class Unrepeatable(Walk):
    def observe(self) -> np.ndarray:
        return super().observe() + noise_of_the_system()


class UnrepeatableReward(Walk):
    def reward(self) -> float:
        return super().reward() + float(noise_of_the_system())


class LivesOn(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.resets += 1
        return super().reset(seed=seed)

    def observe(self) -> np.ndarray:
        return super().observe() + np.float32(0.01 * self.resets)

    def reward(self) -> float:
        return super().reward() + 0.01 * self.resets


def noise_of_the_system() -> np.float32:
    """A number of [0, 0.1) that no seed repeats."""
    return np.float32(int.from_bytes(os.urandom(2)) / 2**16 / 10)


for env in (Float64, SeededOnce, SameArray, Unrepeatable, UnrepeatableReward, LivesOn):
    gym.register(f"{env.__name__}-v0", entry_point=f"tests.hard_envs:{env.__name__}")
