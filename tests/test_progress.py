import sys
from types import SimpleNamespace

import pytest

from rl.args import CommonArgs
from rl.run import progress
from rl.run.progress import Progress


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that goes on by two seconds whenever it is read; it is read once at the start."""
    ticks = iter(range(100, 10_000, 2))
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def show_all(num_updates, enabled=True, scalars=None):
    args = CommonArgs(num_steps=1024, total_timesteps=1024 * num_updates + 5)
    shown = Progress(args, args.num_steps, enabled)
    for update in range(1, num_updates + 1):
        shown.show(update, {"Rewards/rew_avg": 10.04 * update} if scalars is None else scalars)
    shown.close()


def test_a_plain_line_tells_steps_updates_return_speed_and_time_left(capsys):
    show_all(4)
    assert capsys.readouterr() == (
        "",
        "steps 1024/4096, update 1/4, return 10.0, 512 steps/s, 0:00:06 left\n"
        "steps 2048/4096, update 2/4, return 20.1, 512 steps/s, 0:00:04 left\n"
        "steps 3072/4096, update 3/4, return 30.1, 512 steps/s, 0:00:02 left\n"
        "steps 4096/4096, update 4/4, return 40.2, 512 steps/s, 0:00:00 left\n",
    )


@pytest.mark.parametrize(
    ("num_updates", "updates_shown"),
    [
        (1, [1]),
        (19, list(range(1, 20))),
        (96, list(range(4, 97, 4))),
        (43, [*range(2, 43, 2), 43]),
        (1001, [*range(50, 1001, 50), 1001]),
    ],
)
def test_a_run_of_any_length_shows_about_twenty_plain_lines_and_always_its_end(capsys, num_updates, updates_shown):
    show_all(num_updates)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("update ")[1].split("/")[0]) for line in lines] == updates_shown


def test_before_the_first_episode_has_ended_there_is_no_mean_return(capsys):
    show_all(1, scalars={})
    assert "return none yet," in capsys.readouterr().err


def test_a_rank_that_is_not_enabled_says_nothing(capsys):
    show_all(20, enabled=False)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_one_bar_and_no_plain_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_all(3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    last = error.strip().split("\r")[-1]
    assert last.startswith("100%|")
    assert "update 3/3, return 30.1]" in last
    assert "left" not in error
