"""Runs whose processes are killed end as if nothing had happened: a small campaign of `benchmarks/faults.py`."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from benchmarks import faults
from tests.launching import ROOT

pytestmark = pytest.mark.processes  # launched by benchmarks/faults.py

SEED = 2597
PLAIN = ("raw PyTorch", "Fabric", "decoupled")  # a command for each script
LUNAR_LANDER = "Fabric, with videos"
NOT_IN_THE_README = {"raw PyTorch, steps rounded up"}


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            faults, "FLAGS", ("--num-steps=256", f"--total-timesteps={256 * faults.UPDATES}", *faults.FLAGS[2:])
        )
        yield


def draw_trials():
    """In the first command the last process dies at a random moment, in the others the first in a write."""
    first, *others = PLAIN
    kills = [(first, faults.COMMANDS[first].processes - 1, faults.RANDOM)]
    kills += [(name, 0, moment) for name, moment in zip(others, faults.MOMENTS[1:], strict=True)]
    return [
        faults.Trial(number, SEED, name, faults.COMMANDS[name].own, rank, moment)
        for number, (name, rank, moment) in enumerate(kills)
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each trial; two launches at a time."""
    scratch = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: faults.make_reference(name, faults.COMMANDS[name].own, scratch), PLAIN))
        trials = draw_trials()
        return dict(zip(trials, pool.map(partial(faults.run_trial, scratch=scratch), trials), strict=True))


def test_runs_whose_processes_are_killed_end_as_if_nothing_had_happened(outcomes):
    assert {trial: outcome for trial, outcome in outcomes.items() if not outcome.good} == {}


def test_at_most_the_update_under_way_is_done_again(outcomes):
    assert [trial for trial, outcome in outcomes.items() if outcome.updates_redone not in (0, 1)] == []


def kill_once(name, scratch):
    """What becomes of a command on its own environment that is killed right after a checkpoint appeared."""
    env_id = faults.COMMANDS[name].own
    faults.make_reference(name, env_id, scratch)
    return faults.run_trial(faults.Trial(0, SEED, name, env_id, 0, "after the rename"), scratch)


def test_the_lunarlander_command_of_the_readme_survives_a_killed_process(tmp_path):
    outcome = kill_once(LUNAR_LANDER, tmp_path)
    assert outcome.good, outcome


def test_the_commands_of_the_campaign_are_those_of_the_readme():
    text = " ".join((ROOT / "README.md").read_text().replace("\\\n", " ").split())
    assert {name for name, command in faults.COMMANDS.items() if command.line not in text} == NOT_IN_THE_README


def test_a_hundred_kills_strike_every_command_environment_process_and_moment():
    trials = faults.draw_trials(kills=100, seed=1)
    assert len(trials) == 100
    assert sum(trial.moment != faults.RANDOM for trial in trials) == 30
    assert {(trial.command, trial.env_id) for trial in trials} == set(faults.ROWS)
    assert {(trial.command, trial.rank) for trial in trials if trial.moment == faults.RANDOM} == {
        (name, rank) for name, command in faults.COMMANDS.items() for rank in range(command.processes)
    }
    assert {(trial.command, trial.moment) for trial in trials} >= {
        (name, moment) for name in PLAIN for moment in faults.MOMENTS
    }


def test_the_seed_alone_decides_who_is_killed_and_when():
    drawn, again, other = (faults.draw_trials(kills=100, seed=seed) for seed in (1, 1, 2))
    assert drawn == again != other
    assert [trial.draw(0) for trial in drawn] == [trial.draw(0) for trial in again]
