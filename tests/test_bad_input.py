"""Every mistake of the user is answered by one line that names it, at once, and leaves nothing behind."""

import re
from functools import partial

import pytest

from tests.launching import WORKERS, assert_no_process_is_left, fabric_run, files_below, python, run, torchrun

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
LIMIT, LAUNCHER_LIMIT = 10, 30  # seconds

# Put before the real one on the path of a child, this is an installation without moviepy.
WITHOUT_MOVIEPY = """
import sys
from importlib.machinery import PathFinder

class WithoutMoviepy(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] == "moviepy" else super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutMoviepy
"""

# Flags, and what the line must name.
MISTAKES = {
    "an unknown environment": (TORCH, "--env-id CartPol-v1", ["CartPol-v1", "Did you mean", "`CartPole`"]),
    "an unknown version": (TORCH, "--env-id CartPole-v7", ["CartPole-v7", "`v1`"]),
    "an environment of a missing module": (TORCH, "--env-id nowhere:Some-v0", ["nowhere:Some-v0", "No module named"]),
    "an environment of a missing package": (
        TORCH,
        "--env-id PongNoFrameskip-v4",
        ["PongNoFrameskip-v4", "ALE/Pong-v5", "requirements-atari.txt", "module:Id"],
    ),
    "a missing dependency": (TORCH, "--env-id HalfCheetah-v5", ["HalfCheetah-v5", "MuJoCo is not installed"]),
    "an action space": (
        TORCH,
        "--env-id own_envs:WordsToSay-v0",
        ["WordsToSay-v0", "action space Text(", "not supported", "supported are Discrete", "Box"],
    ),
    "an observation space": (
        TORCH,
        "--env-id own_envs:WordsToHear-v0",
        ["WordsToHear-v0", "observation space Text(", "not supported", "supported are Box", "Dict"],
    ),
    "normalised images": (TORCH, "--env-id CarRacing-v3 --normalize-observations", ["CarRacing-v3", "images"]),
    "no environment arguments": (TORCH, "--env-kwargs gravity", ["--env-kwargs", "key=value", "'gravity'"]),
    "an unknown environment argument": (TORCH, "--env-kwargs gravity=3", ["CartPole-v1", "gravity"]),
    "no environments": (TORCH, "--num-envs 0", ["--num-envs", "at least 1", "got 0"]),
    "no environments, Fabric": (FABRIC, "--num-envs 0", ["--num-envs", "at least 1", "got 0"]),
    "no steps": (TORCH, "--num-steps 0", ["--num-steps", "at least 1", "got 0"]),
    "an empty minibatch": (TORCH, "--per-rank-batch-size 0", ["--per-rank-batch-size", "at least 1", "got 0"]),
    "fewer steps than environments": (TORCH, "--num-envs 8 --num-steps 7", ["--num-steps 7", "environments, 8"]),
    "no update": (TORCH, "--total-timesteps 511 --num-steps 512", ["--total-timesteps 511", "--num-steps 512"]),
    "a negative seed": (TORCH, "--seed -1", ["--seed", "got -1"]),
    "a seed of 33 bits": (TORCH, f"--seed {2**32}", ["--seed", f"got {2**32}"]),
    "a learning rate nan": (TORCH, "--learning-rate nan", ["--learning-rate", "got nan"]),
    "a learning rate 0": (TORCH, "--learning-rate 0", ["--learning-rate", "above 0", "got 0.0"]),
    "a discount of 2": (TORCH, "--gamma 2", ["--gamma", "between 0 and 1", "got 2.0"]),
    "a name that is a path": (TORCH, "--exp-name ../ppo", ["--exp-name", "'../ppo'"]),
    "a name too long for a file": (TORCH, f"--exp-name {'a' * 300}", ["--exp-name", "at most 100"]),
    "a timeout without an end": (TORCH, "--timeout 1e300", ["--timeout", "at most 1e6", "got 1e+300"]),
    "no run to resume": (TORCH, "--resume=", ["--resume", "a run's folder or one of its checkpoints", "got ''"]),
    "networks beyond memory": (TORCH, "--hidden-sizes 1e7 1e7", ["--hidden-sizes 10000000 10000000", "GB"]),
    "an unknown preset": (FABRIC, "--preset lunar-landr", ["'lunar-landr'", "perhaps lunar-lander?", "pendulum"]),
    "a player without trainers": (DECOUPLED, "", ["one process", "fabric run --devices=2 train_fabric_decoupled.py"]),
    "a player on a GPU alone": (DECOUPLED, "--player-on-gpu", ["--player-on-gpu", "--cuda"]),
    "no GPU": (TORCH, "--cuda", ["--cuda", "GPU"]),
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
    finished = run(python(script, *flags.split()), tmp_path, timeout=30, env={"PYTHONPATH": str(WORKERS)})
    assert_only_one_line_says(finished, words)


def test_videos_without_moviepy_are_answered_by_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_MOVIEPY)
    finished = run(python(TORCH, "--capture-video"), tmp_path, timeout=30, env={"PYTHONPATH": str(tmp_path)})
    assert_only_one_line_says(finished, ["videos", "moviepy"])


def test_videos_of_an_environment_without_pictures_are_answered_by_one_line(tmp_path):
    flags = ("--capture-video", "--env-id", "own_envs:NoPictures-v0")
    finished = run(python(TORCH, *flags), tmp_path, timeout=30, env={"PYTHONPATH": str(WORKERS)})
    assert_only_one_line_says(finished, ["video", "NoPictures-v0", "rgb_array"])


@pytest.mark.parametrize("script", [TORCH, FABRIC])
def test_a_log_folder_that_cannot_be_written_to_is_answered_by_one_line(tmp_path, script):
    (tmp_path / "logs").write_text("a file")
    finished = run(python(script), tmp_path, timeout=30)
    assert_only_one_line_says(finished, ["log folder", "logs/", "cannot be written to"])
    assert (tmp_path / "logs").read_text() == "a file"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_the_other_variables_is_answered_by_one_line(tmp_path, rank):
    finished = run(python(TORCH), tmp_path, timeout=30, env={"RANK": rank})
    assert_only_one_line_says(finished, ["LOCAL_RANK", "not set", "torchrun"])


def test_several_processes_of_the_fabric_script_without_fabric_run_are_answered_by_one_line(tmp_path):
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = world | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert_only_one_line_says(run(python(FABRIC), tmp_path, timeout=30, env=env), ["train_fabric.py", "`fabric run`"])


@pytest.mark.parametrize(("script", "typed", "meant"), [(TORCH, "--gama", "--gamma"), (DECOUPLED, "--cud", "--cuda")])
def test_the_right_flag_is_suggested_for_a_misspelled_one(tmp_path, script, typed, meant):
    finished = run(python(script, typed, "1"), tmp_path, timeout=30)
    assert finished.returncode != 0
    assert finished.output.count(f"Unrecognized options: {typed}") == 1
    assert re.search(rf"Perhaps you meant:\W+{meant}\b", finished.output)
    assert "Traceback" not in finished.output
    assert finished.seconds < LIMIT
    assert files_below(tmp_path / "logs") == []


def test_a_gpu_for_the_fabric_script_without_one_is_answered_by_one_line(tmp_path):
    env = {"LT_ACCELERATOR": "gpu"}
    finished = run(python(FABRIC), tmp_path, timeout=30, env=env)
    assert_only_one_line_says(finished, ["--accelerator=gpu", "GPU", "--accelerator=cpu"])


@pytest.mark.parametrize("script", [TORCH, FABRIC, DECOUPLED])
def test_the_help_can_be_printed_where_there_is_only_ascii(tmp_path, script):
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    finished = run(python(script, "--help"), tmp_path, timeout=30, env=env)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "--gae-lambda" in finished.stdout


@pytest.mark.parametrize(
    "command", [python, partial(torchrun, 1), partial(fabric_run, 1)], ids=["python", "torchrun", "fabric"]
)
def test_an_environment_in_the_working_directory_is_found(tmp_path, command):
    (tmp_path / "my_envs.py").write_text((WORKERS / "own_envs.py").read_text())
    flags = ["--env-id", "my_envs:NoPictures-v0", "--noise-correlation", "0.5"]
    finished = run(command(FABRIC, *flags), tmp_path, timeout=60)
    assert_one_line_says(finished, ["my_envs:NoPictures-v0 takes Discrete(2)"], LAUNCHER_LIMIT)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--precision=bf16-mixed",), ["--precision=bf16-mixed"]), (("--strategy=dp",), ["--strategy=dp"])],
)
def test_what_fabric_run_takes_and_the_script_does_not_is_answered_once(tmp_path, options, words):
    finished = run(fabric_run(1, FABRIC, options=("--accelerator=cpu", *options)), tmp_path, timeout=60)
    assert_our_line_comes_first(finished, [*words, "is not supported"])
