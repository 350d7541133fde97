"""Wrappers of Gymnasium's environments, each for one flag or one habit of the field."""

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class PressFire(gym.Wrapper):
    """Presses FIRE whenever a life begins, in Atari games that wait for it (Mnih et al. 2015)."""

    FIRE = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and press FIRE."""
        self.env.reset(seed=seed, options=options)
        observation, _, _, _, info = self.env.step(self.FIRE)
        self.lives = info["lives"]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and press FIRE if that has cost a life."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self.lives = self.lives, info["lives"]
        if self.lives < before and not (terminated or truncated):
            observation, more, terminated, truncated, info = self.env.step(self.FIRE)
            reward = cast("float", reward) + cast("float", more)
        return observation, reward, terminated, truncated, info


class LifeLoss(gym.Wrapper):
    """Says in `info["life_lost"]` whether a step has cost one of the lives that `info["lives"]` counts."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and count the lives."""
        observation, info = self.env.reset(seed=seed, options=options)
        if "lives" not in info:
            raise ValueError("--terminal-on-life-loss is for environments that count lives, and this one does not")
        self.lives = info["lives"]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and count again."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self.lives = self.lives, info["lives"]
        return observation, reward, terminated, truncated, {**info, "life_lost": self.lives < before}


class StackChannels(gym.ObservationWrapper):
    """Makes one image of K stacked ones, [K, H, W, C] -> [H, W, K C] or [K, C, H, W] -> [K C, H, W]."""

    def __init__(self, env: gym.Env, has_channels_last: bool) -> None:
        super().__init__(env)
        self.has_channels_last = has_channels_last
        stack = cast("Box", env.observation_space)
        low, high = self.observation(stack.low), self.observation(stack.high)
        self.observation_space = Box(low, high, dtype=stack.dtype.type)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Return the images side by side along the axis of channels."""
        return np.concatenate(list(observation), axis=-1 if self.has_channels_last else 0)
