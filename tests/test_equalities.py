"""E1, E2, E3, E4 and E6: the real scripts, launched, compute the same thing.

Every run writes its checkpoint and its logs; they are compared tensor by tensor and value by value.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.runs import differences, last_checkpoint, run_folders, scalars, tensors
from tests.launching import fabric_run, python, run, torchrun

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
FLAGS = ["--total-timesteps", "768", "--num-steps", "256", "--num-envs", "2", "--update-epochs", "3", "--ortho-init"]
NORMALIZED = ["--normalize-observations", "--normalize-rewards", "--target-kl", "0.02"]
SHORT_RACE = [
    "--num-steps",
    "64",
    "--total-timesteps",
    "192",
    "--env-kwargs",
    "max_episode_steps=20",
    "--test-episodes=2",
]
ENVIRONMENTS = {
    "LunarLander-v3": [*FLAGS, "--compile"],
    "Pendulum-v1": [*FLAGS, *NORMALIZED, "--noise-correlation=0.5", "--init-log-std=-0.5"],
    "CarRacing-v3": [*FLAGS, *SHORT_RACE, "--per-rank-batch-size", "16", "--hidden-sizes", "32"],
}
THOROUGH = "LunarLander-v3"  # all launches
COSTLY = ("torch 1 again", "torch 2", "fabric 2", "decoupled 2", "decoupled 2 again")
DDP = ("--accelerator=cpu", "--strategy=ddp")
LAUNCHES = {
    "torch 1": partial(python, TORCH),
    "torch 1 again": partial(python, TORCH),
    "torch 2": partial(torchrun, 2, TORCH),
    "torch 2 shared": partial(torchrun, 2, TORCH, "--share-data"),
    "fabric 1": partial(python, FABRIC),
    "fabric 2": partial(fabric_run, 2, FABRIC, options=DDP),
    "fabric 2 shared": partial(fabric_run, 2, FABRIC, "--share-data", options=DDP),
    "decoupled 1 shared": partial(fabric_run, 2, DECOUPLED, "--share-data"),
    "decoupled 2": partial(fabric_run, 3, DECOUPLED),
    "decoupled 2 again": partial(fabric_run, 3, DECOUPLED),
}


class Run:
    """What a run of a script left behind."""

    def __init__(self, folder: Path) -> None:
        (self.folder,) = run_folders(folder)
        self.checkpoint = last_checkpoint(self.folder)
        self.tensors = tensors(self.checkpoint)
        self.logged = scalars(self.folder, times=False)


def launch(command: Callable[..., list[str]], folder: Path, *flags: str) -> Run:
    folder.mkdir()
    finished = run(command(*flags), cwd=folder, timeout=120)
    assert finished.returncode == 0, finished.output
    return Run(folder)


def in_environments(*env_ids: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("runs", env_ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All launches in one environment, two at a time; in some environments not all, to save time."""
    env_id = request.param
    launches = LAUNCHES if env_id == THOROUGH else {name: LAUNCHES[name] for name in LAUNCHES if name not in COSTLY}
    root = tmp_path_factory.mktemp(env_id)
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(launch, command, root / name, *ENVIRONMENTS[env_id], "--env-id", env_id)
            for name, command in launches.items()
        }
        return {name: future.result() for name, future in started.items()}


def assert_bit_equal(run: Run, other: Run) -> None:
    assert differences(run.checkpoint, other.checkpoint) == []
    assert run.logged == other.logged


@in_environments(*ENVIRONMENTS)
def test_a_run_trains_and_logs_what_is_compared_here(runs):
    for finished in runs.values():
        assert finished.checkpoint["update"] == 3
        assert finished.checkpoint["global_step"] == 3 * finished.checkpoint["args"]["num_steps"]
        steps = {state["step"].item() for state in finished.checkpoint["optimizer"]["state"].values()}
        assert len(steps) == 1 and steps.pop() >= 3
        assert len(finished.logged["Loss/policy_loss"]) == 3
    weights = "agent actor.0.weight"
    assert not torch.equal(runs["torch 1"].tensors[weights], runs["torch 2 shared"].tensors[weights])


@in_environments(*ENVIRONMENTS)
@pytest.mark.parametrize("launch", ["1", "2 shared"])
def test_e1_raw_pytorch_equals_fabric_bit_for_bit(runs, launch):
    assert_bit_equal(runs[f"torch {launch}"], runs[f"fabric {launch}"])


@in_environments(THOROUGH)
def test_e1_raw_pytorch_equals_fabric_bit_for_bit_where_ranks_keep_their_data(runs):
    assert_bit_equal(runs["torch 2"], runs["fabric 2"])


@in_environments(*ENVIRONMENTS)
def test_e2_one_trainer_that_shares_data_equals_one_coupled_process_bit_for_bit(runs):
    assert_bit_equal(runs["torch 1"], runs["decoupled 1 shared"])


@in_environments(THOROUGH)
def test_e6_the_same_command_twice_is_equal_bit_for_bit(runs):
    assert_bit_equal(runs["torch 1"], runs["torch 1 again"])


@in_environments(THOROUGH)
def test_e6_a_player_and_two_trainers_twice_are_equal_bit_for_bit(runs):
    assert_bit_equal(runs["decoupled 2"], runs["decoupled 2 again"])


def test_e3_and_e4_after_one_update_many_processes_with_small_minibatches_equal_one_with_a_large_one(tmp_path):
    # 2 x 2 environments are the 4 environments of one process, with the same actions: all gather the same rows.
    flags = ["--env-id", "LunarLander-v3", "--total-timesteps", "256", "--num-steps", "256", "--update-epochs", "2"]
    small, large = ["--share-data", "--per-rank-batch-size", "32"], ["--per-rank-batch-size", "64"]
    one = launch(partial(python, TORCH), tmp_path / "one", *flags, *large, "--num-envs", "4")
    coupled = launch(partial(torchrun, 2, TORCH), tmp_path / "two", *flags, *small, "--num-envs", "2")
    decoupled = launch(partial(fabric_run, 3, DECOUPLED), tmp_path / "trainers", *flags, *small, "--num-envs", "4")
    for other in (coupled, decoupled):
        for name, tensor in one.tensors.items():
            # Eight Adam steps: where a gradient is close to zero they magnify its rounding.
            assert torch.allclose(tensor, other.tensors[name], rtol=1e-3, atol=1e-5), name
        for tag in ("Rewards/rew_avg", "Game/ep_len_avg", "Loss/policy_loss", "Loss/value_loss", "Loss/entropy_loss"):
            (step, value), (other_step, other_value) = one.logged[tag][0], other.logged[tag][0]
            assert step == other_step and value == pytest.approx(other_value, rel=1e-4, abs=1e-6), tag
