"""An environment whose observations are so large that the rollout is most of the memory of a run."""

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

WIDTH = 10_000


class Wide(gym.Env):
    """When it is closed it writes the largest memory that its process had, in kB."""

    observation_space = Box(-1, 1, (WIDTH,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(WIDTH, np.float32), {}

    def step(self, action):
        return np.full(WIDTH, 0.5, np.float32), 1.0, False, False, {}

    def close(self):
        # ru_maxrss would not do: a process inherits it from the one that started it.
        status = Path("/proc/self/status").read_text()
        Path("memory").write_text(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


gym.register("Wide-v0", Wide, max_episode_steps=100)
