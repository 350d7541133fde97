"""What is logged of an update, as means over all ranks."""

import math

import torch
from torch import Tensor

from rl.ppo.batch import Batch, Episodes
from rl.ppo.normalize import mean_and_variance, moments
from rl.voice import RunError

LOSS_TAGS = (
    "Loss/loss",
    "Loss/policy_loss",
    "Loss/value_loss",
    "Loss/entropy_loss",
    "Info/approx_kl",
    "Info/clip_fraction",
)
LARGEST_KL = "Info/approx_kl_max"
NUM_LOSS_SUMS = len(LOSS_TAGS) + 2  # and that of the largest divergence, and the number of gradient steps


def sum_episodes(episodes: Episodes) -> Tensor:
    """Return the sums of returns and of lengths, and the number of episodes, float64 [3]."""
    sums = (sum(episodes.returns), sum(episodes.lengths), len(episodes.returns))
    return torch.tensor(sums, dtype=torch.float64)


def sum_experience(episodes: Episodes, batch: Batch) -> Tensor:
    """Return what `sum_episodes` sums, and the moments of returns R and of errors R - V(s), float64 [9].

    Args:
        episodes: that ended in the rollout.
        batch: the rows of the rollout, or those of all ranks on every rank.
    """
    moments_of_rows = [moments(values.unsqueeze(0)) for values in (batch.returns, batch.returns - batch.values)]
    return torch.cat([sum_episodes(episodes).to(batch.returns.device), *moments_of_rows])


def sum_losses(losses: list[Tensor]) -> Tensor:
    """Return sums over the gradient steps, float64 [8]: of each loss, of the largest divergence, and their number.

    Args:
        losses: of each step, what `Losses` holds, [6].
    """
    steps = torch.stack(losses).double()
    largest = steps[:, LOSS_TAGS.index("Info/approx_kl")].max() * len(losses)  # as if each step had it
    return torch.cat([steps.sum(0), torch.stack([largest, largest.new_tensor(len(losses))])])


def sum_up(episodes: Episodes, batch: Batch, losses: list[Tensor]) -> Tensor:
    """Return what `sum_experience` and `sum_losses` sum, one after the other, float64 [17]."""
    return torch.cat([sum_experience(episodes, batch), sum_losses(losses)])


def name_means(sums: Tensor) -> dict[str, float]:
    """Name the means of what `sum_up` summed, over all ranks.

    Of the largest divergence it is the mean of each rank's. The explained variance is 1 - Var(R - V(s)) / Var(R); where
    all returns are alike there is none. Without an episode that ended there is no mean return and no mean length.

    Raises:
        RunError: if a loss is NaN or infinite.
    """
    sums = sums.cpu()
    return_sum, length_sum, episodes = sums[:3].tolist()
    (_, variance), (_, unexplained) = map(mean_and_variance, sums[3:9].view(2, 3))
    *loss_sums, steps = sums[9:].tolist()
    means = {tag: loss_sum / steps for tag, loss_sum in zip((*LOSS_TAGS, LARGEST_KL), loss_sums, strict=True)}
    if wrong := [tag for tag, mean in means.items() if not math.isfinite(mean)]:
        raise RunError(f"{', '.join(wrong)} is NaN or infinite")
    if variance > 0:
        means["Info/explained_variance"] = 1 - (unexplained / variance).item()
    means["Game/episodes"] = episodes
    if episodes:
        means |= {"Rewards/rew_avg": return_sum / episodes, "Game/ep_len_avg": length_sum / episodes}
    return means
