"""Evaluations during training: they disturb nothing, keep the best agent, and end the run on all ranks alike."""

import shutil
import sys
from functools import partial

import pytest
import torch

from benchmarks.runs import differences, last_checkpoint, run_folders, scalars
from tests.launching import ROOT, assert_no_process_is_left, fabric_run, python, run, torchrun

UPDATES = 6
RUN = ["--total-timesteps=1536", "--num-steps=256", "--num-envs=2", "--update-epochs=2", "--test-episodes=2"]
EVALUATED = ["--eval-every=2", "--eval-episodes=3"]
WITHOUT = ("Eval/return", "Eval/length")
COMMANDS = {
    "torch": partial(torchrun, 2, "train_torch.py"),
    "decoupled": partial(fabric_run, 2, "train_fabric_decoupled.py", "--overlap"),
}


def start(command, cwd, *flags):
    cwd.mkdir(exist_ok=True)
    finished = run(command(*flags), cwd=cwd, timeout=300)
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    (folder,) = run_folders(cwd)
    return folder, finished


@pytest.fixture(scope="module", params=COMMANDS)
def runs(request, tmp_path_factory):
    """A script's command, and its runs: without evaluations, with them, and one that an evaluation ends."""
    root, command = tmp_path_factory.mktemp(request.param), COMMANDS[request.param]
    plain, _ = start(command, root / "plain", *RUN)
    evaluated, _ = start(command, root / "evaluated", *RUN, *EVALUATED, "--keep-checkpoints=1", "--checkpoint-every=9")
    highest = max(value for _, value in scalars(evaluated)["Eval/return"][:2])  # of the updates 2 and 4
    aim = highest - 0.01  # the log rounds
    solved, finished = start(command, root / "solved", *RUN, *EVALUATED, f"--stop-at={aim}")
    return command, plain, evaluated, solved, finished


def test_a_run_with_evaluations_equals_one_without_bit_for_bit(runs):
    _, plain, evaluated, _, _ = runs
    assert differences(last_checkpoint(plain), last_checkpoint(evaluated)) == []
    logged = scalars(evaluated, times=False)
    evaluations = [logged.pop(tag) for tag in WITHOUT]
    assert logged == scalars(plain, times=False)
    assert [[step for step, _ in points] for points in evaluations] == [[512, 1024, 1536]] * 2


def test_the_best_agent_stays_and_can_be_tested(runs):
    _, _, evaluated, _, _ = runs
    returns = [value for _, value in scalars(evaluated)["Eval/return"]]
    best = torch.load(evaluated / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["update"] == 2 * (returns.index(max(returns)) + 1)
    assert best["best_return"] == pytest.approx(max(returns), rel=1e-6)
    assert sorted(path.name for path in (evaluated / "checkpoints").iterdir()) == ["best.ckpt", "update_00000006.ckpt"]
    command = [sys.executable, "-m", "rl.evaluate", str(evaluated / "checkpoints" / "best.ckpt")]
    tested = run([*command, "--episodes=2"], cwd=ROOT, timeout=120)
    assert tested.stdout.splitlines()[-1].startswith("mean_return="), tested.output


def test_an_evaluation_that_reaches_its_aim_ends_the_run_with_checkpoint_and_test(runs):
    _, _, evaluated, solved, finished = runs
    first, second, _ = (value for _, value in scalars(evaluated)["Eval/return"])
    update, aim = 2 if first >= second else 4, max(first, second) - 0.01
    assert last_checkpoint(solved)["update"] == update
    assert finished.stderr.count(f"an evaluation reached --stop-at {aim:g} after update {update}\n") == 1
    ((step, _),) = scalars(solved)["Test/cumulative_reward"]
    assert step == update * 256


def test_a_run_that_has_reached_its_aim_goes_on_when_asked_as_if_it_had_not_stopped(runs, tmp_path):
    command, _, evaluated, solved, _ = runs
    shutil.copytree(solved.parents[2], tmp_path / "copy")
    (folder,) = run_folders(tmp_path / "copy")
    refused = run(command("--resume", str(folder)), cwd=tmp_path, timeout=120)
    assert refused.returncode != 0
    assert len(refused.error_lines) == 1
    assert "raise it to train on" in refused.error_lines[0]
    start(command, tmp_path / "copy", "--resume", str(folder), "--stop-at=inf")
    assert differences(last_checkpoint(folder), last_checkpoint(evaluated)) == []
    assert scalars(folder, times=False)["Loss/loss"] == scalars(evaluated, times=False)["Loss/loss"]


def test_all_ranks_together_play_the_episodes_that_one_alone_plays(tmp_path):
    """In this environment the seed alone decides on the episode."""
    flags = [*RUN, *EVALUATED, "--env-id=tests.scripted_env:ScriptedBySeed-v0"]
    one, _ = start(partial(python, "train_torch.py"), tmp_path / "one", *flags)
    two, _ = start(partial(torchrun, 2, "train_torch.py"), tmp_path / "two", *flags, "--num-envs=1")
    assert scalars(one)["Eval/return"] == scalars(two)["Eval/return"]
    assert scalars(one)["Eval/length"] == scalars(two)["Eval/length"]
