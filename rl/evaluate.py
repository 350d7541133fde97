"""Evaluation: whole episodes with the greedy policy."""

from pathlib import Path

import numpy as np
import torch

from rl.agent import Agent
from rl.envs import make_envs, record_first_episode, reset_envs
from rl.seeding import Purpose

TEST_EPISODES = 10


@torch.inference_mode()
def evaluate(agent: Agent, env_id: str, episodes: int, seed: int, video_folder: Path | None = None) -> np.ndarray:
    """Return the return of each episode, float64 [episodes], acting greedily.

    Episode k has its own seed, so the episodes are the same however many run at once. Each environment runs one
    episode only: to take the first that end would favour short ones.

    Args:
        agent: the policy.
        env_id: Gymnasium id.
        episodes: number of episodes.
        seed: seed of the test.
        video_folder: where every episode is recorded. They then run one by one, since the frames of a whole
            episode are held in memory.
    """
    device = next(agent.parameters()).device
    returns = np.full(episodes, np.nan)
    at_once = 1 if video_folder else episodes
    for first in range(0, episodes, at_once):
        record = record_first_episode(video_folder, f"test-{first}") if video_folder else None
        envs = make_envs(env_id, at_once, record)
        observations = reset_envs(envs, seed, first, Purpose.TEST)
        block = returns[first : first + at_once]
        while np.isnan(block).any():
            actions = agent.act_greedily(torch.tensor(observations, dtype=torch.float32, device=device))
            observations, _, _, _, info = envs.step(actions.cpu().numpy())
            if "episode" in info:
                first_end = info["_episode"] & np.isnan(block)
                block[first_end] = info["episode"]["r"][first_end]
        envs.close()
    return returns
