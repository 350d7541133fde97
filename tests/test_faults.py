"""Runs whose processes are killed end as if nothing had happened: a small campaign of `benchmarks/faults.py`."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from benchmarks import faults

ENV_ID = "CartPole-v1"
SEED = 2597
FLAGS = ("--num-steps=256", f"--total-timesteps={256 * faults.UPDATES}", "--test-episodes=1")


def draw_trials():
    """Every process dies at a random moment; those that write checkpoints also in a write, each at another moment."""
    at_random = [(script, rank, faults.RANDOM) for script, count in faults.PROCESSES.items() for rank in range(count)]
    in_writes = [(script, 0, moment) for script, moment in zip(faults.PROCESSES, faults.MOMENTS, strict=True)]
    return [
        faults.Trial(number, SEED, script, ENV_ID, rank, moment)
        for number, (script, rank, moment) in enumerate(at_random + in_writes)
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each trial; two launches at a time."""
    scratch = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(faults, "FLAGS", FLAGS)
        list(pool.map(partial(faults.make_reference, env_id=ENV_ID, scratch=scratch), faults.PROCESSES))
        trials = draw_trials()
        return dict(zip(trials, pool.map(partial(faults.run_trial, scratch=scratch), trials), strict=True))


def test_runs_whose_processes_are_killed_end_as_if_nothing_had_happened(outcomes):
    assert {trial: outcome for trial, outcome in outcomes.items() if not outcome.good} == {}


def test_at_most_the_update_under_way_is_done_again(outcomes):
    assert [trial for trial, outcome in outcomes.items() if outcome.updates_redone not in (0, 1)] == []


def test_one_restart_is_enough(outcomes):
    assert {outcome.restarts for outcome in outcomes.values()} == {1}
