"""A run on a short pendulum, and what its policy does, written out in NumPy."""

import re
from statistics import NormalDist

import gymnasium as gym
import numpy as np
import torch

from rl.seeding import Purpose, stream_seed

EPISODES, SEED = 5, 10_000
LAST_LINE = re.compile(r"mean_return=(-?\d+\.\d\d) std_return=(\d+\.\d\d) episodes=(\d+)")


def steepen(run_folder, folder):
    """Leave a checkpoint of a policy whose actions often leave the bounds; return its path and its weights."""
    checkpoint = torch.load(max((run_folder / "checkpoints").iterdir()), weights_only=True)
    checkpoint["agent"]["actor.4.weight"] *= 20
    path = folder / "update_00000002.ckpt"
    torch.save(checkpoint, path)
    return path, {name: value.double().numpy() for name, value in checkpoint["agent"].items()}


def policy(weights, observations):
    """The unclipped mean actions, written out in NumPy."""
    hidden = (observations - weights["observation_normalizer.mean"]) / weights["observation_normalizer.std"]
    hidden = np.clip(hidden, -10, 10)
    for layer in (0, 2):
        hidden = np.maximum(hidden @ weights[f"actor.{layer}.weight"].T + weights[f"actor.{layer}.bias"], 0)
    return hidden @ weights["actor.4.weight"].T + weights["actor.4.bias"]


def clipped_on_average(mean, std):
    """The mean of a normal distribution that is clipped to -2 and 2: two atoms, and what lies between."""
    z, low, high = NormalDist(), (-2 - mean) / std, (2 - mean) / std
    inside = mean * (z.cdf(high) - z.cdf(low)) + std * (z.pdf(low) - z.pdf(high))
    return -2 * z.cdf(low) + inside + 2 * (1 - z.cdf(high))


def slow_returns(weights, noise=None):
    """One episode after the other, without a vector of environments, with `noise` [steps, episodes, 1] or greedily."""
    std = np.exp(weights["distribution.log_std"])
    returns = []
    for index in range(EPISODES):
        env = gym.make("Pendulum-v1", g=9.0, max_episode_steps=60)
        observation, _ = env.reset(seed=stream_seed(SEED, Purpose.TEST, index))
        returns.append(0.0)
        for step in range(60):
            mean = policy(weights, observation)
            if noise is None:
                action = np.array([clipped_on_average(mean.item(), std.item())])
            else:
                action = np.clip(mean + std * noise[step, index].double().numpy(), -2, 2)
            observation, reward, _, _, _ = env.step(action.astype(np.float32))
            returns[-1] += reward
    return np.array(returns)
