"""Environments of our own, named as `own_envs:NoPictures-v0` where this folder is in PYTHONPATH."""

from typing import ClassVar

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class NoPictures(CartPoleEnv):
    """CartPole that cannot be rendered."""

    metadata: ClassVar[dict] = {"render_modes": []}


gym.register("NoPictures-v0", NoPictures)
