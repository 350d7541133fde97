"""The statistics of the learning benchmark, against values worked out by hand."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.learning import interquartile_mean, learning_curve


def test_the_interquartile_mean_is_that_of_the_middle_half_and_lies_in_its_interval():
    mean, low, high = interquartile_mean([-1000.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1000.0])
    assert mean == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert -1000 < low < mean < high < 1000


def test_the_interval_of_equal_values_is_that_value():
    assert interquartile_mean([500.0] * 10) == (500.0, 500.0, 500.0)


def test_a_learning_curve_averages_the_last_100_episodes_weighted_by_their_number(tmp_path):
    updates = [(60, 1.0), (0, 1.0), (60, 4.0), (30, 10.0), (100, 20.0)]  # episodes, their mean return
    with SummaryWriter(tmp_path) as writer:
        for update, (episodes, mean_return) in enumerate(updates, start=1):
            writer.add_scalar("Game/episodes", episodes, update * 1000)
            writer.add_scalar("Rewards/rew_avg", mean_return, update * 1000, walltime=50.0 + update)
    (log,) = tmp_path.glob("events*")
    assert learning_curve(log, start=50.0) == [
        (3000, 3.0, pytest.approx((60 * 1 + 60 * 4) / 120)),
        (4000, 4.0, pytest.approx((60 * 1 + 60 * 4 + 30 * 10) / 150)),
        (5000, 5.0, pytest.approx(20)),
    ]
