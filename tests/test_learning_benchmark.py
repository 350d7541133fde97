"""The statistics of the learning benchmark, against values worked out by hand."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.learning import interquartile_mean, learning_curve, print_table, script_entry


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


@pytest.mark.parametrize(
    ("command", "env_id", "program", "processes"),
    [
        ("train_torch.py", "CartPole-v1", "python", 1),
        ("train_torch.py --preset acrobot --gamma=0.9", "Acrobot-v1", "python", 1),
        ("fabric run --devices=3 train_fabric_decoupled.py --env-id=Pendulum-v1", "Pendulum-v1", "fabric", 3),
        ("torchrun --nproc_per_node 2 train_torch.py --env-id Pendulum-v1", "Pendulum-v1", "torchrun", 2),
    ],
)
def test_a_command_of_the_users_is_run_as_it_stands(command, env_id, program, processes):
    entry = script_entry(command)
    assert (entry.env_id, entry.processes) == (env_id, processes)
    start, *rest = entry.command
    assert start.rpartition("/")[2].startswith(program)
    assert f"{program} {' '.join(rest)}" == (command if program != "python" else f"python {command}")


@pytest.mark.parametrize(
    ("seconds", "medians"),
    [
        ((20, 30), ("20 | 1.0", "30 | 1.5")),
        ((None, 30), ("never | ", "30 | ")),
        ((20, None), ("20 | 1.0", "never | ")),
    ],
)
def test_a_ratio_of_seconds_stands_where_both_land(seconds, medians, capsys):
    print_table(
        [
            {"entry": name, "seed": 1, "commit": "x", "mean_return": 400, "seconds": 50, "steps": 1000}
            | {"solved": landed and [500, landed]}
            for name, landed in zip(("cartpole", "CartPole, stable-baselines3"), seconds, strict=True)
        ]
    )
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ", 3)[3].removesuffix(" |") for row in rows] == list(medians)
