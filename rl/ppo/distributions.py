"""Distributions of actions: how the policy's output becomes actions, log-probabilities and entropies.

An action is a function of the policy's output and of noise. The noise of a whole rollout is drawn at once, for each
environment from a stream of its own: sampling then costs almost nothing per step, and what an environment
experiences does not depend on the process it runs in.

Each distribution has the same members:

    num_outputs             outputs of the policy network, O
    empty_actions(*shape)   array of actions, [*shape, ...], as the learner stores them
    draw_noise(rng, T)      noise of one environment, float32 [T, noise of a step]
    sample(outputs, noise)  actions [..., action] for outputs [..., O]
    greedy(outputs)         the actions to take without noise
    log_prob_and_entropy    log p(a) and H, each [...]
    to_env(actions)         the actions as the environment takes them, on the CPU
"""

import math
from collections.abc import Sequence
from typing import Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from rl.seeding import Purpose, stream


class Categorical(nn.Module):
    """Distribution over the A actions of a `Discrete` space, given logits [..., A]."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
        super().__init__()
        self.num_outputs = int(space.n)
        self.start = torch.tensor(space.start, dtype=getattr(torch, space.dtype.name))
        self.is_shifted = bool(space.start) or self.start.dtype != torch.int64

    def empty_actions(self, *shape: int) -> Tensor:
        """Return an array for actions, int64 [*shape]."""
        return torch.zeros(shape, dtype=torch.int64)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Draw standard Gumbel noise, float32 [T, A]."""
        return rng.gumbel(size=(num_steps, self.num_outputs)).astype(np.float32)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Return actions int64 [...]: argmax(logits + Gumbel noise) is a sample of softmax(logits)."""
        return (logits + noise).argmax(-1)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the most probable actions, int64 [...]."""
        return logits.argmax(-1)

    def log_prob_and_entropy(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(a) and H = -Σ_a p(a) log p(a), each [...], for actions int64 [...]."""
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy

    def to_env(self, actions: Tensor) -> Tensor:
        """Return the actions counted from the space's start, in its type, [...]."""
        return actions.to(self.start.dtype) + self.start if self.is_shifted else actions


class MultiCategorical(nn.Module):
    """Independent choices of a `MultiDiscrete` space with K entries, given their logits side by side."""

    def __init__(self, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        self.sizes = space.nvec.flatten().tolist()
        self.start = torch.tensor(space.start)
        self.num_outputs = sum(self.sizes)
        self.parts = [Categorical(gym.spaces.Discrete(size)) for size in self.sizes]

    def empty_actions(self, *shape: int) -> Tensor:
        """Return an array for actions, int64 [*shape, K]."""
        return torch.zeros(*shape, len(self.sizes), dtype=torch.int64)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Draw standard Gumbel noise, float32 [T, O]."""
        return rng.gumbel(size=(num_steps, self.num_outputs)).astype(np.float32)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Return actions int64 [..., K]."""
        return self.greedy(logits + noise)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the most probable actions, int64 [..., K]."""
        return torch.stack([part.argmax(-1) for part in logits.split(self.sizes, -1)], -1)

    def log_prob_and_entropy(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the choices of log p(a_k) and of H_k, each [...], for actions int64 [..., K]."""
        choices = zip(self.parts, logits.split(self.sizes, -1), actions.unbind(-1), strict=True)
        log_probs, entropies = zip(*(part.log_prob_and_entropy(*choice) for part, *choice in choices), strict=True)
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)

    def to_env(self, actions: Tensor) -> Tensor:
        """Return the actions in the shape and type of the space, counted from its start, [N, ...]."""
        return actions.reshape(-1, *self.start.shape).to(self.start.dtype) + self.start


class Bernoulli(nn.Module):
    """Independent yes or no for each of the n entries of a `MultiBinary` space, given logits [..., n]."""

    def __init__(self, space: gym.spaces.MultiBinary) -> None:
        super().__init__()
        self.shape = space.shape
        self.num_outputs = math.prod(space.shape)

    def empty_actions(self, *shape: int) -> Tensor:
        """Return an array for actions, int8 [*shape, n]."""
        return torch.zeros(*shape, self.num_outputs, dtype=torch.int8)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Draw standard logistic noise, float32 [T, n]."""
        return rng.logistic(size=(num_steps, self.num_outputs)).astype(np.float32)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Return actions int8 [..., n]: logit + logistic noise is positive with probability sigmoid(logit)."""
        return self.greedy(logits + noise)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the most probable actions, int8 [..., n]."""
        return (logits > 0).to(torch.int8)

    def log_prob_and_entropy(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the entries of log p(a_i) and of H_i, each [...], for actions [..., n]."""
        log_prob = -binary_cross_entropy_with_logits(logits, actions.to(logits.dtype), reduction="none")
        entropy = binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
        return log_prob.sum(-1), entropy.sum(-1)

    def to_env(self, actions: Tensor) -> Tensor:
        """Return the actions in the shape of the space, int8 [N, ...]."""
        return actions.reshape(-1, *self.shape)


class DiagonalGaussian(nn.Module):
    """Independent normal distributions for the D entries of a `Box` space, given their means [..., D].

    The standard deviations do not depend on the observation: their logarithms are parameters. The
    learner sees the action as it was drawn; only on the way to the environment is it clipped to the bounds.
    """

    def __init__(self, space: gym.spaces.Box) -> None:
        super().__init__()
        self.low, self.high = torch.tensor(space.low), torch.tensor(space.high)
        self.num_outputs = math.prod(space.shape)
        self.log_std = nn.Parameter(torch.zeros(self.num_outputs))

    def empty_actions(self, *shape: int) -> Tensor:
        """Return an array for actions, float32 [*shape, D]."""
        return torch.zeros(*shape, self.num_outputs)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Draw standard normal noise, float32 [T, D]."""
        return rng.standard_normal((num_steps, self.num_outputs), dtype=np.float32)

    def sample(self, means: Tensor, noise: Tensor) -> Tensor:
        """Return actions float32 [..., D]: mean + standard deviation * noise."""
        return means + self.log_std.exp() * noise

    def greedy(self, means: Tensor) -> Tensor:
        """Return what the environment gets on average, E[clip(a)] for a ~ N(μ, σ²), float32 [..., D].

        E[clip(a)] = μ + E[max(low - a, 0)] - E[max(a - high, 0)]. That is μ far from the bounds. Near a bound μ alone
        would be another policy than the one that was trained, whose noise the bound cuts on one side.
        """
        std = self.log_std.exp()
        low, high = self.low.flatten().to(means), self.high.flatten().to(means)
        return means + std * (_expected_excess((low - means) / std) - _expected_excess((means - high) / std))

    def log_prob_and_entropy(self, means: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(a) = -½ Σ_i [((a_i - μ_i) / σ_i)² + 2 log σ_i + log 2π] and H = Σ_i log σ_i + D/2 log 2πe."""
        squares = ((actions - means) / self.log_std.exp()).square()
        log_prob = -0.5 * (squares + 2 * self.log_std + math.log(2 * math.pi)).sum(-1)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return log_prob, entropy.expand_as(log_prob)

    def to_env(self, actions: Tensor) -> Tensor:
        """Return the actions clipped to the bounds, in the shape and type of the space, [N, ...]."""
        return actions.reshape(-1, *self.low.shape).to(self.low.dtype).clamp(self.low, self.high)


def _expected_excess(x: Tensor) -> Tensor:
    """Return E[max(x + z, 0)] = x Φ(x) + φ(x) for a standard normal z, of the same shape; x may be -inf."""
    x = x.clamp(min=-10)  # from there on it is 0 in double precision, too
    return x * torch.special.ndtr(x) + (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


class Distribution(Protocol):
    """What the classes above have in common, see the docstring of this module."""

    num_outputs: int

    def empty_actions(self, *shape: int) -> Tensor: ...  # noqa: D102
    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray: ...  # noqa: D102
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor: ...  # noqa: D102
    def greedy(self, outputs: Tensor) -> Tensor: ...  # noqa: D102
    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def to_env(self, actions: Tensor) -> Tensor: ...  # noqa: D102


def draw_action_noise(
    distribution: Distribution,
    num_steps: int,
    env_indices: Sequence[int],
    seed: int,
    update: int,
    correlation: float = 0.0,
) -> Tensor:
    """Draw the action noise of a rollout, float32 [T, N, ...].

    Normal noise may last: ε_t = ρ ε_{t-1} + √(1 - ρ²) ξ_t is standard normal in every step, as ξ_t is, and so each
    action is distributed as before. But pushes of one direction follow each other, where independent ones would cancel
    out (Hollenstein et al. 2024, "Colored Noise in PPO").

    Args:
        distribution: of the actions.
        num_steps: T.
        env_indices: the N environments' indices among those of all processes.
        seed: seed of the run.
        update: the update that the rollout is for.
        correlation: ρ, of a step's noise with that of the step before; only for normal noise.
    """
    streams = (stream(seed, Purpose.ACTION, index, update) for index in env_indices)
    noise = np.stack([distribution.draw_noise(rng, num_steps) for rng in streams], axis=1)
    if correlation:
        for t in range(1, num_steps):
            noise[t] = correlation * noise[t - 1] + math.sqrt(1 - correlation**2) * noise[t]
    return torch.from_numpy(noise)
