"""What is logged of an update is the mean over all ranks."""

import math

import pytest
import torch

from rl.ppo.batch import Episodes
from rl.ppo.loss import Losses
from rl.ppo.metrics import LOSS_TAGS, NUM_LOSS_SUMS, name_means, sum_episodes, sum_losses, sum_up
from rl.voice import RunError

NONE = Episodes([], [])


def losses(*steps):
    """What two gradient steps might give: in step k each loss is k, ten times as large from one loss to the next."""
    return [torch.tensor([step * 10.0**place for place in range(6)]) for step in steps]


def test_the_tags_stand_in_the_order_of_the_losses():
    assert tuple(tag.partition("/")[2] for tag in LOSS_TAGS) == Losses._fields


def test_means_are_those_over_all_episodes_and_steps_of_all_ranks():
    ranks = [
        sum_up(Episodes([1.0, 2.0], [10, 20]), losses(1, 2, 3)),
        sum_up(Episodes([6.0], [60]), losses(4)),  # a rank with fewer of both
        sum_up(NONE, losses(5, 6)),
    ]
    means = name_means(sum(ranks))
    assert [means.pop(tag) for tag in LOSS_TAGS] == pytest.approx([3.5 * 10**place for place in range(6)], rel=1e-12)
    assert means == {"Game/episodes": 3, "Rewards/rew_avg": 3.0, "Game/ep_len_avg": 30.0}


def test_without_an_episode_that_ended_there_is_no_mean_return():
    assert name_means(sum_up(NONE, losses(1))).keys() == {*LOSS_TAGS, "Game/episodes"}


def test_sums_are_of_float64_so_that_thousands_of_steps_lose_nothing():
    assert sum_losses([torch.full((6,), 0.1)] * 5000)[0].item() == pytest.approx(5000 * float(torch.tensor(0.1)))
    assert sum_episodes(Episodes([2.0**24, 1.0], [2**24, 1])).tolist() == [2**24 + 1, 2**24 + 1, 2]
    assert len(sum_losses(losses(1))) == NUM_LOSS_SUMS
    assert sum_up(NONE, losses(1)).dtype == torch.float64


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(number):
    wrong = losses(1, 2)
    wrong[1][[1, 4]] = number
    with pytest.raises(RunError, match=r"^Loss/policy_loss, Info/approx_kl is NaN or infinite$"):
        name_means(sum_up(NONE, wrong))
