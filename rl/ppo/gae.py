"""Advantages: how much better an action was than the policy's average."""

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def generalized_advantage_estimation(
    rewards: Tensor, values: Tensor, next_values: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Return the advantages A_t, float32 [T, N] (Schulman et al. 2016, "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", equations 11 and 16).

        δ_t = r_t + γ V(s'_t) - V(s_t)
        A_t = δ_t + γ λ (1 - done_t) A_{t+1},    A_T = 0

    where s'_t is the observation that step t led to. What the end of an episode means is folded into V(s'_t): it is
    0 where the episode terminated, and the value of the final observation where it was truncated. The end of the
    rollout needs no special case. The return that the value function learns is A_t + V(s_t).

    Args:
        rewards: r_t, [T, N].
        values: V(s_t), [T, N].
        next_values: V(s'_t), [T, N].
        dones: whether step t ended an episode, bool [T, N].
        gamma: discount factor γ.
        gae_lambda: λ.
    """
    # NumPy, because it takes less time than PyTorch to begin an operation, and a step has only a few numbers.
    deltas = (rewards + gamma * next_values - values).cpu().numpy()
    decay = (gamma * gae_lambda * ~dones).cpu().numpy()
    advantages = np.zeros((len(deltas) + 1, *deltas.shape[1:]), dtype=np.float32)  # [T + 1, N]
    for t in reversed(range(len(deltas))):
        advantages[t] = deltas[t] + decay[t] * advantages[t + 1]
    return torch.from_numpy(advantages[:-1]).to(rewards.device)
