"""Distributions of actions: how the policy's output becomes actions, log-probabilities and entropies.

An action is a function of the policy's output and of noise. The noise of a whole rollout is drawn at once, for each
environment from a stream of its own: sampling then costs almost nothing per step, and what an environment
experiences does not depend on the process it runs in.
"""

from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rl.seeding import Purpose, stream


class Categorical:
    """Distribution over the actions 0, ..., A - 1 of a `Discrete` space, given logits [..., A]."""

    def __init__(self, action_space: gym.spaces.Discrete) -> None:
        self.num_outputs = int(action_space.n)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Draw the noise of one environment for `num_steps` steps: standard Gumbel, float32 [T, A]."""
        return rng.gumbel(size=(num_steps, self.num_outputs)).astype(np.float32)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Return actions int64 [...]: argmax(logits + Gumbel noise) is a sample of softmax(logits)."""
        return (logits + noise).argmax(-1)

    def mode(self, logits: Tensor) -> Tensor:
        """Return the most probable actions, int64 [...]."""
        return logits.argmax(-1)

    def log_prob_and_entropy(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(a) and H = -Σ_a p(a) log p(a), each [...], for actions int64 [...]."""
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


def draw_action_noise(
    distribution: Categorical, num_steps: int, env_indices: Sequence[int], seed: int, update: int
) -> Tensor:
    """Draw the action noise of a rollout, float32 [T, N, ...].

    Args:
        distribution: of the actions.
        num_steps: T.
        env_indices: the N environments' indices among those of all processes.
        seed: seed of the run.
        update: the update that the rollout is for.
    """
    streams = (stream(seed, Purpose.ACTION, index, update) for index in env_indices)
    return torch.from_numpy(np.stack([distribution.draw_noise(rng, num_steps) for rng in streams], axis=1))
