"""Ranks gather different experience and all the same hold the same weights: in a real training of two processes."""

from itertools import combinations

import pytest
import torch

from tests.launching import ROOT, WORKERS, assert_no_process_is_left, run, torchrun

RANKS, NUM_ENVS, UPDATES = 2, 3, 3
LENGTH = 32  # steps of each environment in a rollout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank kept: per update, what it saw and drew; the weights before each update and at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    steps = RANKS * NUM_ENVS * LENGTH
    flags = f"--num-envs {NUM_ENVS} --num-steps {steps} --total-timesteps {UPDATES * steps} --per-rank-batch-size 32"
    command = torchrun(RANKS, WORKERS / "train_and_keep.py", str(folder), str(ROOT / "train_torch.py"), *flags.split())
    finished = run(command, folder, timeout=60, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def of_every_environment(ranks, name, update):
    """One tensor [T, ...] for each environment of each rank."""
    return [environment for rank in ranks for environment in rank[name][update].unbind(1)]


def same_bits(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("update", range(UPDATES))
@pytest.mark.parametrize("name", ["observations", "actions", "noise"])
def test_no_two_environments_of_any_ranks_see_do_or_draw_the_same(ranks, name, update):
    streams = of_every_environment(ranks, name, update)
    assert len(streams) == RANKS * NUM_ENVS
    assert all(len(stream) == LENGTH for stream in streams)
    assert not any(torch.equal(*pair) for pair in combinations(streams, 2))


def test_the_environments_start_in_different_states(ranks):
    first = [stream[0] for stream in of_every_environment(ranks, "observations", update=0)]
    assert not any(torch.equal(*pair) for pair in combinations(first, 2))


def test_every_update_draws_new_noise(ranks):
    streams = [stream for update in range(UPDATES) for stream in of_every_environment(ranks, "noise", update)]
    assert not any(torch.equal(*pair) for pair in combinations(streams, 2))


def test_ranks_hold_bit_equal_weights_before_every_update_and_at_the_end(ranks):
    for rank in ranks:
        assert len(rank["weights"]) == UPDATES + 1
        for before, after in zip(rank["weights"], rank["weights"][1:], strict=False):
            assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))  # all of them learn
    for weights, *others in zip(*(rank["weights"] for rank in ranks), strict=True):
        for other in others:
            assert all(same_bits(*pair) for pair in zip(weights, other, strict=True))


def test_ranks_hold_bit_equal_states_of_the_optimizer_at_the_end(ranks):
    first, *others = (rank["optimizer"] for rank in ranks)
    assert len(first) == 3 * len(ranks[0]["weights"][0])
    for other in others:
        assert all(same_bits(*pair) for pair in zip(first, other, strict=True))
