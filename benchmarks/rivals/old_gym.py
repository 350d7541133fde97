"""Gymnasium's environments under the interface of Gym 0.23, as far as CleanRL 1.2.0's ppo.py uses it.

A step of Gym's own lander takes more than twice as long.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics


class _RecordEpisodeStatistics(RecordEpisodeStatistics):
    """With the method that seeded Gym's environments."""

    def seed(self, seed: int) -> None:
        """Seed the environment."""
        self.reset(seed=seed)


class _SyncVectorEnv(SyncVectorEnv):
    """Environments that step together, one process."""

    def __init__(self, env_fns: list[Callable[[], gymnasium.Env]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, **options: Any) -> np.ndarray:
        """Return the first observations."""
        return super().reset(**options)[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return observations, rewards, whether episodes ended, and the returns and lengths of those that did."""
        observations, rewards, terminated, truncated, infos = super().step(actions)
        dones = terminated | truncated
        episodes = infos["final_info"]["episode"] if dones.any() else {}
        ended = [{"episode": {key: episodes[key][index] for key in "rl"}} for index in np.flatnonzero(dones)]
        return observations, rewards, dones, ended


def install() -> None:
    """Let `import gym` find this."""
    sys.modules["gym"] = SimpleNamespace(
        make=gymnasium.make,
        spaces=gymnasium.spaces,
        vector=SimpleNamespace(SyncVectorEnv=_SyncVectorEnv),
        wrappers=SimpleNamespace(RecordEpisodeStatistics=_RecordEpisodeStatistics),
    )
