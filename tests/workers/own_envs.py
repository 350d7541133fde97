"""Environments of our own, named as `own_envs:NoPictures-v0` where this folder is in PYTHONPATH."""

from typing import ClassVar

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class NoPictures(CartPoleEnv):
    """CartPole that cannot be rendered."""

    metadata: ClassVar[dict] = {"render_modes": []}


class WordsToSay(CartPoleEnv):
    """CartPole with an action space that nobody supports."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Text(10)


class WordsToHear(CartPoleEnv):
    """CartPole with an observation space that nobody supports."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Text(10)


for env in (NoPictures, WordsToSay, WordsToHear):
    gym.register(f"{env.__name__}-v0", env)
