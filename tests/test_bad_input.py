"""Every mistake of the user is answered by one line that names it, at once, and leaves nothing behind."""

import re
from functools import partial

import pytest

from tests.launching import assert_no_process_is_left, fabric_run, files_below, python, run, torchrun

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
LIMIT, LAUNCHER_LIMIT = 10, 30  # seconds

# One of each script: flags, and what the line must name. All the others are tested in one process, without a launch.
MISTAKES = {
    "an unknown environment": (TORCH, "--env-id CartPol-v1", ["CartPol-v1", "Did you mean", "`CartPole`"]),
    "no environments": (FABRIC, "--num-envs 0", ["--num-envs", "at least 1", "got 0"]),
    "a player without trainers": (DECOUPLED, "", ["one process", "fabric run --devices=2 train_fabric_decoupled.py"]),
}


def assert_one_line_says(finished, words, limit=LIMIT):
    assert finished.returncode != 0
    assert len(finished.error_lines) == 1, finished.output
    for word in words:
        assert word in finished.error_lines[0]
    assert finished.seconds < limit
    assert files_below(finished.cwd / "logs") == []
    assert_no_process_is_left(finished)


def assert_only_one_line_says(finished, words):
    assert_one_line_says(finished, words)
    assert finished.output.splitlines() == finished.error_lines


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_one_line_that_names_it(tmp_path, mistake):
    script, flags, words = MISTAKES[mistake]
    finished = run(python(script, *flags.split()), tmp_path, timeout=30)
    assert_only_one_line_says(finished, words)


def test_a_rank_without_the_other_variables_is_answered_by_one_line(tmp_path):
    finished = run(python(TORCH), tmp_path, timeout=30, env={"RANK": "1"})
    assert_only_one_line_says(finished, ["LOCAL_RANK", "not set", "torchrun"])


def test_the_right_flag_is_suggested_for_a_misspelled_one(tmp_path):
    finished = run(python(DECOUPLED, "--gama", "1"), tmp_path, timeout=30)
    assert finished.returncode != 0
    assert finished.output.count("Unrecognized options: --gama") == 1
    assert re.search(r"Perhaps you meant:\W+--gamma\b", finished.output)
    assert "Traceback" not in finished.output
    assert finished.seconds < LIMIT
    assert files_below(tmp_path / "logs") == []


def test_the_help_can_be_printed_where_there_is_only_ascii(tmp_path):
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    finished = run(python(DECOUPLED, "--help"), tmp_path, timeout=30, env=env)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "--gae-lambda" in finished.stdout


@pytest.mark.parametrize("command", [python, partial(fabric_run, 1)], ids=["python", "fabric"])
def test_an_environment_in_the_working_directory_is_found(tmp_path, command):
    register = 'gymnasium.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv")'
    (tmp_path / "my_envs.py").write_text(f"import gymnasium\n{register}\n")
    flags = ["--env-id", "my_envs:Mine-v0", "--noise-correlation", "0.5"]
    finished = run(command(FABRIC, *flags), tmp_path, timeout=60)
    assert_one_line_says(finished, ["my_envs:Mine-v0 takes Discrete(2)"], LAUNCHER_LIMIT)


def assert_our_line_comes_first(finished, words):
    assert_one_line_says(finished, words, LAUNCHER_LIMIT)
    ours, launchers = finished.output.find("error: "), finished.output.find("Traceback")
    assert ours < launchers, finished.output
    assert finished.output.count("Traceback") == 1, finished.output  # the launcher's: no rank has one


def test_an_unknown_environment_under_torchrun_is_answered_once(tmp_path):
    finished = run(torchrun(2, TORCH, "--env-id", "CartPol-v1"), tmp_path, timeout=60)
    assert_our_line_comes_first(finished, ["CartPol-v1", "`CartPole`"])


def test_a_missing_gpu_under_torchrun_is_answered_once(tmp_path):
    finished = run(torchrun(2, TORCH, "--cuda"), tmp_path, timeout=60)
    assert_our_line_comes_first(finished, ["--cuda", "GPU"])


def test_more_trainers_than_experiences_under_fabric_run_are_answered_once(tmp_path):
    flags = ["--num-steps", "4", "--num-envs", "2", "--total-timesteps", "100"]
    finished = run(fabric_run(6, DECOUPLED, *flags), tmp_path, timeout=60)
    assert_our_line_comes_first(finished, ["5 trainers", "4 experiences", "--num-steps"])


def test_what_fabric_run_takes_and_the_script_does_not_is_answered_once(tmp_path):
    finished = run(fabric_run(1, FABRIC, options=("--accelerator=cpu", "--strategy=dp")), tmp_path, timeout=60)
    assert_our_line_comes_first(finished, ["--strategy=dp", "is not supported"])
