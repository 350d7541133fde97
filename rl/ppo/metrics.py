"""What is logged of an update, as means over all ranks."""

import math

import torch
from torch import Tensor

from rl.ppo.batch import Episodes
from rl.voice import RunError

LOSS_TAGS = (
    "Loss/loss",
    "Loss/policy_loss",
    "Loss/value_loss",
    "Loss/entropy_loss",
    "Info/approx_kl",
    "Info/clip_fraction",
)
NUM_LOSS_SUMS = len(LOSS_TAGS) + 1  # and the number of gradient steps


def sum_episodes(episodes: Episodes) -> Tensor:
    """Return the sums of returns and of lengths, and the number of episodes, float64 [3]."""
    sums = (sum(episodes.returns), sum(episodes.lengths), len(episodes.returns))
    return torch.tensor(sums, dtype=torch.float64)


def sum_losses(losses: list[Tensor]) -> Tensor:
    """Return the sum of each loss over the gradient steps, and the number of steps, float64 [7].

    Args:
        losses: of each step, what `Losses` holds, [6].
    """
    sums = torch.stack(losses).double().sum(0)
    return torch.cat([sums, sums.new_tensor([len(losses)])])


def sum_up(episodes: Episodes, losses: list[Tensor]) -> Tensor:
    """Return what `sum_episodes` and `sum_losses` sum, one after the other, float64 [10]."""
    sums = sum_losses(losses)
    return torch.cat([sum_episodes(episodes).to(sums.device), sums])


def name_means(sums: Tensor) -> dict[str, float]:
    """Name the means of what `sum_up` summed, over all ranks.

    Without an episode that ended there is no mean return and no mean length.

    Raises:
        RunError: if a loss is NaN or infinite.
    """
    return_sum, length_sum, episodes, *loss_sums, steps = sums.tolist()
    means = {tag: loss_sum / steps for tag, loss_sum in zip(LOSS_TAGS, loss_sums, strict=True)}
    if wrong := [tag for tag, mean in means.items() if not math.isfinite(mean)]:
        raise RunError(f"{', '.join(wrong)} is NaN or infinite")
    means["Game/episodes"] = episodes
    if episodes:
        means |= {"Rewards/rew_avg": return_sum / episodes, "Game/ep_len_avg": length_sum / episodes}
    return means
