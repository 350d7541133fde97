"""The PPO objective (Schulman et al. 2017, "Proximal Policy Optimization Algorithms") and its three terms."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rl.args import CommonArgs
from rl.ppo.batch import Batch


class Losses(NamedTuple):
    """The loss and its terms, and two measures of how far the policy moved; each a scalar tensor."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def surrogate_objective(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Return min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), [b], where ρ = π(a|s) / π_old(a|s) (equation 7).

    Args:
        log_ratio: log ρ, [b].
        advantages: A, [b].
        clip_coef: ε.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def squared_value_error(values: Tensor, returns: Tensor) -> Tensor:
    """Return (V - R)², [b] (L^VF of equation 9)."""
    return (values - returns).square()


def clipped_value_error(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Return max((V - R)², (V_old + clip(V - V_old, -ε, ε) - R)²), [b] (Engstrom et al. 2020, section 3)."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return torch.maximum(squared_value_error(values, returns), squared_value_error(clipped, returns))


def ppo_loss(
    agent: Callable[..., tuple[Tensor, Tensor, Tensor]], minibatch: Batch, mean_rows: float, args: CommonArgs
) -> Losses:
    """Return the loss of a minibatch: -L^CLIP + c_v L^VF - c_e H (equation 9).

    Args:
        agent: maps observations and actions to log-probabilities, entropies and values, each [b].
        minibatch: b rows.
        mean_rows: the average of b over the ranks. Sums over rows are divided by it, so that the average of the ranks'
            gradients is the gradient of the global minibatch, also where the ranks' b differ by one.
        args: ε is `clip_coef`, c_v is `vf_coef`, c_e is `ent_coef`.
    """
    log_probs, entropies, values = agent(minibatch.observations, minibatch.actions)
    log_ratio = log_probs - minibatch.log_probs
    if args.clip_vloss:
        value_errors = clipped_value_error(values, minibatch.values, minibatch.returns, args.clip_coef)
    else:
        value_errors = squared_value_error(values, minibatch.returns)
    policy_loss = -surrogate_objective(log_ratio, minibatch.advantages, args.clip_coef).sum() / mean_rows
    value_loss = value_errors.sum() / mean_rows
    entropy_loss = -entropies.sum() / mean_rows
    loss = policy_loss + args.vf_coef * value_loss + args.ent_coef * entropy_loss
    with torch.no_grad():
        ratio = log_ratio.exp()
        approx_kl = (ratio - 1 - log_ratio).sum() / mean_rows  # never negative, unlike -log ρ (Schulman 2020)
        clip_fraction = ((ratio - 1).abs() > args.clip_coef).sum() / mean_rows
    return Losses(loss, policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction)
