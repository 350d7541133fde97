"""Normalisation of advantages, observations and rewards, with statistics over all ranks.

Statistics travel as moments, which add up over ranks: so every rank uses the same.
"""

import gymnasium as gym
import torch
from torch import Tensor, nn

from rl.spaces import Image, observation_parts

ADVANTAGE_EPSILON = 1e-8
VARIANCE_EPSILON = 1e-8
ELEMENTS = 2**20  # whose moments are computed at once, which bounds the memory
LARGEST = 10.0  # normalised observations and rewards are clipped to ±10


def moments(samples: Tensor) -> Tensor:
    """Return count, sum and sum of squares over the first two axes of [T, N, ...], float64 [3, ...]."""
    total = samples.new_zeros(3, *samples.shape[2:], dtype=torch.float64)
    for block in samples.split(max(1, ELEMENTS // max(1, samples[0].numel()))):
        exact = block.double()
        count = torch.full_like(exact[0, 0], exact.shape[0] * exact.shape[1])
        total += torch.stack([count, exact.sum((0, 1)), exact.square().sum((0, 1))])
    return total


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance, float64 [...] each, of samples with these moments [3, ...]."""
    count, total, total_square = moments
    mean = total / count
    return mean, (total_square / count - mean.square()).clamp(min=0)


def normalize_advantages(advantages: Tensor, moments: Tensor) -> Tensor:
    """Return (A - mean) / (std + 1e-8), float32 [T, N].

    The moments are those of the whole global batch, so that the result does not depend on how the batch is cut
    into ranks and minibatches.

    Args:
        advantages: [T, N].
        moments: count, sum and sum of squares, float64 [3].
    """
    mean, variance = mean_and_variance(moments)
    return ((advantages.double() - mean) / (variance.sqrt() + ADVANTAGE_EPSILON)).float()


class ObservationNormalizer(nn.Module):
    """Shifts and scales observations to mean 0 and variance 1 of all observations so far; images stay as they are.

    The result is clipped to ±10. Before the first update there are no statistics, and observations stay as they are.

    During a rollout and the update that learns from it the statistics stand still, so that the policy that is
    improved is the one that acted.
    """

    is_vector: Tensor
    moments: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__()
        parts = observation_parts(observation_space)
        is_vector = torch.cat([torch.full((part.size,), not isinstance(part, Image)) for part in parts])
        self.register_buffer("is_vector", is_vector, persistent=False)
        self.register_buffer("moments", torch.zeros(3, len(is_vector), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(len(is_vector)))
        self.register_buffer("std", torch.ones(len(is_vector)))

    def update(self, new_moments: Tensor) -> None:
        """Add the moments of new observations, summed over all ranks, float64 [3, D]."""
        self.moments += new_moments
        mean, variance = mean_and_variance(self.moments)
        self.mean.copy_(mean)
        self.std.copy_((variance + VARIANCE_EPSILON).sqrt())

    @property
    def limit(self) -> Tensor:
        """What normalised observations are clipped to, float32 [D]: infinite before the first update."""
        return torch.where(self.moments[0] > 0, LARGEST, torch.inf)

    def forward(self, observations: Tensor) -> Tensor:
        """Return normalised observations, float32 [..., D]."""
        limit = self.limit
        normalized = ((observations - self.mean) / self.std).clamp(-limit, limit)
        return torch.where(self.is_vector, normalized, observations)


class RewardNormalizer(nn.Module):
    """Divides rewards by the standard deviation of the discounted sum of rewards so far (Engstrom et al. 2020)."""

    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def update(self, new_moments: Tensor) -> None:
        """Add the moments of new discounted sums, summed over all ranks, float64 [3]."""
        self.moments += new_moments

    def forward(self, rewards: Tensor) -> Tensor:
        """Return scaled rewards, float32 [T, N]."""
        _, variance = mean_and_variance(self.moments)
        return (rewards / (variance + VARIANCE_EPSILON).sqrt()).clamp(-LARGEST, LARGEST).float()
