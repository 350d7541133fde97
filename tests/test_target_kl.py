"""With --target-kl an update ends where the policy has moved too far: on all ranks at once, by their mean."""

import json
from math import exp

import numpy as np
import pytest
import torch

from benchmarks.runs import last_checkpoint, run_folders
from rl.args import TorchArgs
from tests.launching import ROOT, WORKERS, assert_no_process_is_left, fabric_run, python, run, torchrun

BOUND = 0.3
EPOCHS, STEPS_OF_AN_EPOCH = 3, 2


def kl(shift):
    """The approximate KL divergence where every ratio is exp(shift)."""
    return exp(shift) - 1 - shift


# Update after update, how far the two ranks' data are off.
SHIFTS = [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.8], [0.6, 1.0]]
assert [(kl(a) + kl(b)) / 2 > BOUND for a, b in SHIFTS] == [True, False, True, False, True]
assert kl(1.0) > BOUND and kl(0.8) > BOUND > kl(0.6)  # one rank alone exceeds it in all updates but the second


EPOCHS_TAKEN = [1 if (kl(a) + kl(b)) / 2 > BOUND else EPOCHS for a, b in SHIFTS]
STEPS = [STEPS_OF_AN_EPOCH * epochs for epochs in EPOCHS_TAKEN]


def worker(folder, script):
    """The words of a run of a script that keeps in a folder what happened."""
    flags = f"--num-steps 64 --total-timesteps {64 * len(SHIFTS)} --num-envs 2 --per-rank-batch-size 16"
    flags += f" --update-epochs {EPOCHS} --target-kl {BOUND} --learning-rate 1e-12 --test-episodes 1"
    return [WORKERS / "stop_by_kl.py", str(folder), json.dumps(SHIFTS), str(ROOT / script), *flags.split()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks kept of one run."""
    folder = tmp_path_factory.mktemp("target_kl")
    command = torchrun(2, *worker(folder, "train_torch.py"), "--normalize-observations", "--normalize-rewards")
    finished = run(command, folder, timeout=60, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    kept = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    return kept, last_checkpoint(run_folders(folder)[0])["agent"]


def test_both_ranks_stop_after_the_first_epoch_where_their_mean_exceeds_the_bound_and_nowhere_else(ranks):
    for rank in ranks[0]:
        assert rank["steps"] == STEPS


@pytest.mark.parametrize(
    ("processes", "script", "options"),
    [
        (2, "train_fabric.py", ("--accelerator=cpu", "--strategy=ddp")),
        (3, "train_fabric_decoupled.py", ()),
    ],
)
def test_with_fabric_the_mean_over_those_that_optimize_decides_as_well(processes, script, options, tmp_path):
    command = fabric_run(processes, *worker(tmp_path, script), "--no-compile", options=options)
    finished = run(command, tmp_path, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    for place in range(2):
        assert torch.load(tmp_path / f"rank{place}.pt")["steps"] == STEPS


def test_the_statistics_of_observations_are_those_of_all_that_both_ranks_have_seen(ranks):
    kept, agent = ranks
    assert not torch.equal(kept[0]["observations"][0], kept[1]["observations"][0])
    for updates, state in ((5, agent), (4, kept[0]["normalizers"]), (4, kept[1]["normalizers"])):
        seen = [part.double().reshape(-1, 4) for rank in kept for part in rank["observations"][:updates]]
        everything = torch.cat(seen).numpy()
        assert state["observation_normalizer.moments"][0].unique().tolist() == [64 * updates]
        np.testing.assert_allclose(state["observation_normalizer.mean"], everything.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state["observation_normalizer.std"], everything.std(0), rtol=1e-5, atol=1e-7)


def test_the_statistics_of_rewards_are_those_of_all_that_both_ranks_have_earned(ranks):
    kept, agent = ranks
    sums = []
    for rank in kept:
        standing = np.zeros(2)
        for rewards, dones in zip(torch.cat(rank["rewards"]).numpy(), torch.cat(rank["dones"]).numpy(), strict=True):
            standing = TorchArgs().gamma * standing + rewards
            sums.append(standing)
            standing = np.where(dones, 0, standing)
    expected = [np.size(sums), np.sum(sums), np.square(sums).sum()]
    np.testing.assert_allclose(agent["reward_normalizer.moments"], expected, rtol=1e-12)


@pytest.mark.parametrize(("bound", "epochs"), [("", 4), ("--target-kl 0.01", 1)])
def test_a_policy_that_moves_far_is_stopped_only_where_a_bound_says_so(bound, epochs, tmp_path):
    flags = "--num-steps 64 --total-timesteps 64 --per-rank-batch-size 32 --update-epochs 4 --test-episodes 1"
    command = python("train_torch.py", *flags.split(), "--learning-rate", "0.1", *bound.split())
    finished = run(command, tmp_path, timeout=60)
    assert finished.returncode == 0, finished.output
    optimizer = last_checkpoint(run_folders(tmp_path)[0])["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.1
    assert {state["step"].item() for state in optimizer["state"].values()} == {2 * epochs}
