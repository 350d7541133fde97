"""The commands that use a trained agent, started as a user starts them."""

import re
import sys

import numpy as np
import pytest
import torch

from benchmarks.runs import run_folders
from tests.launching import ROOT, python, run
from tests.pendulum_run import EPISODES, LAST_LINE, slow_returns, steepen

FLAGS = "--env-id Pendulum-v1 --normalize-observations --total-timesteps 512 --num-steps 256"
ENV_KWARGS = ["--env-kwargs", "g=9.0", "max_episode_steps=60"]

MY_ENVS = """
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

gym.register("Mine-v0", PendulumEnv, max_episode_steps=60)
"""

# Put before the real one on the path of a child, this is an installation without onnx.
WITHOUT_ONNX = """
import sys
from importlib.machinery import PathFinder

class WithoutOnnx(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] == "onnx" else super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOnnx
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    finished = run(python("train_torch.py", *FLAGS.split(), *ENV_KWARGS), folder, timeout=60)
    assert finished.returncode == 0, finished.output
    return run_folders(folder)[0]


@pytest.fixture(scope="module")
def steep(run_folder, tmp_path_factory):
    return steepen(run_folder, tmp_path_factory.mktemp("steep"))


def test_the_command_restores_policy_normalisation_and_gravity_and_ends_with_its_line(run_folder, steep):
    finished = run([sys.executable, "-m", "rl.evaluate", str(steep[0]), "--episodes", str(EPISODES)], ROOT, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    lines, truth = finished.stdout.splitlines(), slow_returns(steep[1])
    mean, std, episodes = LAST_LINE.fullmatch(lines[-1]).groups()
    assert float(mean) == pytest.approx(truth.mean(), abs=0.02)
    assert float(std) == pytest.approx(truth.std(), abs=0.02)
    assert int(episodes) == EPISODES
    figures = [float(figure) for figure in re.findall(r"-?\d+\.?\d*", lines[-3])]
    np.testing.assert_allclose(figures, [truth.mean(), truth.std(), truth.min(), truth.max()], atol=0.02)
    assert lines[-2] == "length: mean 60.00, std 0.00, min 60, max 60"


def test_an_export_without_onnx_is_answered_by_one_line(run_folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_ONNX)
    command = [sys.executable, "-m", "rl.export", str(run_folder), str(tmp_path / "agent.onnx")]
    finished = run(command, ROOT, timeout=60, env={"PYTHONPATH": str(tmp_path)})
    assert finished.returncode == 1
    assert finished.output == "error: the export needs more packages: pip install -r requirements-export.txt\n"
    assert not (tmp_path / "agent.onnx").exists()


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_command_that_is_started_as_a_file_says_how_it_is_started(name, tmp_path):
    finished = run(python(f"rl/{name}.py"), tmp_path, timeout=30)
    assert finished.returncode == 1
    assert finished.output.splitlines() == finished.error_lines
    assert f"`python -m rl.{name}`" in finished.error_lines[0]


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_the_help_of_a_command_can_be_printed_where_there_is_only_ascii(name):
    command = [sys.executable, "-m", f"rl.{name}", "--help"]
    finished = run(command, ROOT, timeout=60, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "--help" in finished.stdout


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_command_finds_an_environment_in_the_working_directory(name, run_folder, tmp_path):
    if name == "export":
        pytest.importorskip("onnxscript", reason="export is optional: requirements-export.txt")
    (tmp_path / "my_envs.py").write_text(MY_ENVS)
    checkpoint = torch.load(max((run_folder / "checkpoints").iterdir()), weights_only=True)
    checkpoint["args"]["env_id"] = "my_envs:Mine-v0"
    torch.save(checkpoint, tmp_path / "update_00000002.ckpt")
    words = {"evaluate": ["--episodes", "1"], "export": ["agent.onnx"]}[name]
    code = f"import sys; sys.path.append({str(ROOT)!r}); import rl.{name}; rl.{name}.main()"
    command = [sys.executable, "-P", "-c", code, "update_00000002.ckpt", *words]
    finished = run(command, tmp_path, timeout=60)
    assert finished.returncode == 0, finished.output
