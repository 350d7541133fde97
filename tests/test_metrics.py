"""What is logged of an update is the mean over all ranks."""

import math

import pytest
import torch

from rl.ppo.batch import Batch, Episodes
from rl.ppo.loss import Losses
from rl.ppo.metrics import LARGEST_KL, LOSS_TAGS, NUM_LOSS_SUMS, name_means, sum_episodes, sum_losses, sum_up
from rl.voice import RunError

NONE = Episodes([], [])
ALIKE = Batch(*torch.zeros(6, 4))  # rows whose returns are all the same


def losses(*steps):
    """What two gradient steps might give: in step k each loss is k, ten times as large from one loss to the next."""
    return [torch.tensor([step * 10.0**place for place in range(6)]) for step in steps]


def test_the_tags_stand_in_the_order_of_the_losses():
    assert tuple(tag.partition("/")[2] for tag in LOSS_TAGS) == Losses._fields


def test_means_are_those_over_all_episodes_and_steps_of_all_ranks():
    ranks = [
        sum_up(Episodes([1.0, 2.0], [10, 20]), ALIKE, losses(1, 2, 3)),
        sum_up(Episodes([6.0], [60]), ALIKE, losses(4)),  # a rank with fewer of both
        sum_up(NONE, ALIKE, losses(5, 6)),
    ]
    means = name_means(sum(ranks))
    assert means.pop(LARGEST_KL) == pytest.approx((3 * 3 + 4 + 2 * 6) / 6 * 1e4)
    assert [means.pop(tag) for tag in LOSS_TAGS] == pytest.approx([3.5 * 10**place for place in range(6)], rel=1e-12)
    assert means == {"Game/episodes": 3, "Rewards/rew_avg": 3.0, "Game/ep_len_avg": 30.0}


def test_without_an_episode_that_ended_there_is_no_mean_return():
    assert name_means(sum_up(NONE, ALIKE, losses(1))).keys() == {*LOSS_TAGS, LARGEST_KL, "Game/episodes"}


def test_the_largest_divergence_is_the_mean_over_the_ranks_of_that_of_a_gradient_step():
    ranks = [sum_up(NONE, ALIKE, losses(1, 7, 2)), sum_up(NONE, ALIKE, losses(3, 1, 1))]
    assert name_means(sum(ranks))[LARGEST_KL] == pytest.approx(5e4)


def test_the_explained_variance_is_that_of_the_returns_of_all_ranks():
    returns, values = torch.randn(2, 100), torch.randn(2, 100)
    batches = [ALIKE._replace(returns=rank, values=value) for rank, value in zip(returns, values, strict=True)]
    means = name_means(sum(sum_up(NONE, batch, losses(1)) for batch in batches))
    expected = 1 - (returns - values).double().var(correction=0) / returns.double().var(correction=0)
    assert means["Info/explained_variance"] == pytest.approx(expected.item(), rel=1e-6)


def test_sums_are_of_float64_so_that_thousands_of_steps_lose_nothing():
    assert sum_losses([torch.full((6,), 0.1)] * 5000)[0].item() == pytest.approx(5000 * float(torch.tensor(0.1)))
    assert sum_episodes(Episodes([2.0**24, 1.0], [2**24, 1])).tolist() == [2**24 + 1, 2**24 + 1, 2]
    assert len(sum_losses(losses(1))) == NUM_LOSS_SUMS
    assert sum_up(NONE, ALIKE, losses(1)).dtype == torch.float64


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(number):
    wrong = losses(1, 2)
    wrong[1][[1, 3]] = number
    with pytest.raises(RunError, match=r"^Loss/policy_loss, Loss/entropy_loss is NaN or infinite$"):
        name_means(sum_up(NONE, ALIKE, wrong))
