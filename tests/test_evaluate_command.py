"""`python -m rl.evaluate` and `python -m rl.export` on a run that the script has just left behind."""

import copy
import os
import pickle
import re
import sys
import warnings
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch

import rl.evaluate
import rl.export
from benchmarks.runs import run_folders
from rl.ppo.distributions import draw_action_noise
from rl.run.resuming import load_agent
from rl.seeding import Purpose, stream_seed
from tests.launching import ROOT, python, run

EPISODES, SEED = 5, 10_000
LAST_LINE = re.compile(r"mean_return=(-?\d+\.\d\d) std_return=(\d+\.\d\d) episodes=(\d+)")
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
    """A checkpoint of a policy whose actions often leave the bounds, and its weights."""
    path = max((run_folder / "checkpoints").iterdir())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["agent"]["actor.4.weight"] *= 10
    path = tmp_path_factory.mktemp("steep") / "update_00000002.ckpt"
    torch.save(checkpoint, path)
    return path, {name: value.double().numpy() for name, value in checkpoint["agent"].items()}


def policy(weights, observations):
    """The unclipped mean actions, written out in NumPy."""
    hidden = (observations - weights["observation_normalizer.mean"]) / weights["observation_normalizer.std"]
    hidden = np.clip(hidden, -10, 10)
    for layer in (0, 2):
        hidden = np.maximum(hidden @ weights[f"actor.{layer}.weight"].T + weights[f"actor.{layer}.bias"], 0)
    return hidden @ weights["actor.4.weight"].T + weights["actor.4.bias"]


def slow_returns(weights, noise=None):
    """One episode after the other, without a vector of environments; `noise` [steps, episodes, 1] is added."""
    returns = []
    for index in range(EPISODES):
        env = gym.make("Pendulum-v1", g=9.0, max_episode_steps=60)
        observation, _ = env.reset(seed=stream_seed(SEED, Purpose.TEST, index))
        returns.append(0.0)
        for step in range(60):
            action = policy(weights, observation)
            if noise is not None:
                action = action + np.exp(weights["distribution.log_std"]) * noise[step, index].double().numpy()
            observation, reward, _, _, _ = env.step(np.clip(action, -2, 2).astype(np.float32))
            returns[-1] += reward
    return np.array(returns)


def call(module, *words):
    """Run a command in this process."""
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, words)]), mock.patch.dict(os.environ):
        module.main()


def evaluated(capsys, *words):
    call(rl.evaluate, *words, "--episodes", EPISODES)
    return capsys.readouterr().out.splitlines()


def failure(capsys, module, *words):
    """The one line with which a command ends."""
    with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as end:
        warnings.simplefilter("always")
        call(module, *words)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n"), [str(each.message) for each in warned]) == (1, "", 1, [])
    assert err.startswith("error: ")
    return err


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


def test_the_last_checkpoint_of_a_folder_and_the_file_itself_are_the_same(run_folder, capsys):
    path = max((run_folder / "checkpoints").iterdir())
    assert evaluated(capsys, run_folder) == evaluated(capsys, path)


def test_the_same_seed_gives_the_same_line_and_another_seed_another(run_folder, capsys):
    first = evaluated(capsys, run_folder, "--seed", 7)
    assert evaluated(capsys, run_folder, "--seed", 7) == first
    assert evaluated(capsys, run_folder, "--seed", 8)[-1] != first[-1]


def test_stochastic_episodes_draw_their_actions_and_repeat_too(steep, capsys):
    path, weights = steep
    lines = evaluated(capsys, path, "--stochastic")
    agent, _ = load_agent(path)
    noise = draw_action_noise(agent.distribution, 256, range(EPISODES), SEED, 0)  # of 256 steps at once
    truth = slow_returns(weights, noise)
    assert float(LAST_LINE.fullmatch(lines[-1])[1]) == pytest.approx(truth.mean(), abs=0.02)
    assert evaluated(capsys, path, "--stochastic") == lines
    assert evaluated(capsys, path)[-1] != lines[-1]


def test_statistics_are_frozen_in_evaluation(run_folder):
    agent, args = load_agent(run_folder)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    assert before["observation_normalizer.moments"][0].tolist() == [512] * 3
    rl.evaluate.evaluate(agent, args, 2, SEED)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_videos_are_written_one_for_each_episode_and_can_be_decoded(run_folder, tmp_path, capsys):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="comes with moviepy")
    folder = tmp_path / "videos"
    call(rl.evaluate, run_folder, "--episodes", 2, "--video", folder)
    capsys.readouterr()
    files = sorted(folder.glob("*.mp4"))
    assert len(files) == 2
    for file in files:
        frames = imageio_ffmpeg.read_frames(str(file))
        width, height = next(frames)["size"]
        pictures = [np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in frames]
        assert len(pictures) == 61  # before, between and after 60 steps
        assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 50  # the pendulum has moved
        assert pictures[0].std() > 10
    assert files[0].read_bytes() != files[1].read_bytes()


def test_the_exported_file_acts_as_the_policy_written_out_and_stays_inside_the_bounds(steep, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export is optional: requirements-export.txt")
    path, weights = steep
    file = tmp_path / "agent.onnx"
    call(rl.export, path, file)
    out, err = capfd.readouterr()
    assert (len(out.splitlines()), str(file) in out, err) == (1, True, "")
    assert [path.name for path in tmp_path.iterdir()] == ["agent.onnx"]
    session = onnxruntime.InferenceSession(file)
    (given,), (taken,) = session.get_inputs(), session.get_outputs()
    assert (given.name, taken.name) == ("observation", "action")
    rng = np.random.default_rng(5)
    for batch in (1, 2, 500):
        angles, speeds = rng.uniform(-np.pi, np.pi, batch), rng.uniform(-8, 8, batch)
        observations = np.stack([np.cos(angles), np.sin(angles), speeds], 1).astype(np.float32)
        (actions,) = session.run(None, {"observation": observations})
        unclipped = policy(weights, observations.astype(np.float64))
        assert (actions.shape, actions.dtype) == ((batch, 1), np.float32)
        np.testing.assert_allclose(actions, np.clip(unclipped, -2, 2), rtol=1e-4, atol=1e-4)
    assert (np.abs(unclipped) > 2).mean() > 0.1 and (np.abs(unclipped) < 2).mean() > 0.1
    assert np.abs(actions).max() == 2


def test_an_export_whose_file_would_act_differently_is_refused_and_leaves_no_file(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the export is optional: requirements-export.txt")
    agent, _ = load_agent(run_folder)

    export = torch.onnx.export

    def forgetful(policy, *args, **kwargs):
        other = copy.deepcopy(policy)
        other.agent.actor[4].bias.data += 1e-3
        return export(other, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", forgetful)
    with pytest.raises(ValueError, match="acts differently"):
        rl.export.export(agent, torch.rand(20, 3), tmp_path / "agent.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_onnx_is_answered_by_one_line(run_folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_ONNX)
    command = [sys.executable, "-m", "rl.export", str(run_folder), str(tmp_path / "agent.onnx")]
    finished = run(command, ROOT, timeout=60, env={"PYTHONPATH": str(tmp_path)})
    assert finished.returncode == 1
    assert finished.output == "error: the export needs more packages: pip install -r requirements-export.txt\n"
    assert not (tmp_path / "agent.onnx").exists()


def test_a_file_that_cannot_be_written_is_named(run_folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the export is optional: requirements-export.txt")
    line = failure(capsys, rl.export, run_folder, tmp_path / "nowhere" / "agent.onnx")
    assert str(tmp_path / "nowhere" / "agent.onnx") in line and "cannot be written" in line


@pytest.mark.parametrize("module", [rl.evaluate, rl.export], ids=lambda module: module.__name__)
def test_a_run_that_does_not_exist_is_named_in_one_line(module, tmp_path, capsys):
    words = [tmp_path / "run"] + [tmp_path / "agent.onnx"] * (module is rl.export)
    assert f"there is no run and no checkpoint {tmp_path / 'run'}" in failure(capsys, module, *words)


def test_a_folder_without_a_checkpoint_is_named_in_one_line(tmp_path, capsys):
    assert f"the folder {tmp_path} holds no checkpoints" in failure(capsys, rl.evaluate, tmp_path)


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.95, 0.999])
def test_a_truncated_checkpoint_is_named_in_one_line(part, steep, tmp_path, capsys):
    whole, file = steep[0].read_bytes(), tmp_path / "update_00000002.ckpt"
    file.write_bytes(whole[: int(part * len(whole))])
    assert f"{file} cannot be read: it is damaged" in failure(capsys, rl.evaluate, file)


@pytest.mark.parametrize(
    "content",
    [b"mean_return=1\n", b"0.1,0.2\n", b"[1, 2]\n", b"(1, 2)\n", b"a text\n", b"G", b"\x80", b"\x08\x0a", b"\x00" * 64],
)
def test_a_file_of_another_kind_is_named_in_one_line(content, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(content)
    assert f"{file} cannot be read: it is damaged, or no checkpoint of ours" in failure(capsys, rl.evaluate, file)


def test_a_checkpoint_of_something_else_is_named_with_what_it_lacks(tmp_path, capsys):
    file = tmp_path / "other.pt"
    torch.save({"agent": {}, "update": 1, "args": {}}, file)
    line = failure(capsys, rl.evaluate, file)
    assert (
        f"{file} is no checkpoint of ours: it lacks acting_weights, environments, global_step, optimizer, scalars"
        in line
    )


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda what, file: file.write_bytes(pickle.dumps(what))])
def test_code_inside_a_checkpoint_is_not_executed(save, tmp_path, capsys):
    file, trace = tmp_path / "evil.ckpt", tmp_path / "executed"
    save({"agent": Evil(trace), "optimizer": {}, "update": 1, "global_step": 1, "args": {}}, file)
    assert f"{file} cannot be read" in failure(capsys, rl.evaluate, file)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # it would have been


@pytest.mark.parametrize("flag", ["--episodes", "--max-steps"])
def test_no_episodes_and_no_steps_are_answered_by_one_line(flag, run_folder, capsys):
    assert f"{flag} must be at least 1, got 0" in failure(capsys, rl.evaluate, run_folder, flag, "0")


def test_episodes_are_cut_after_the_steps_of_the_command_or_else_of_the_run(run_folder, tmp_path, capsys):
    assert evaluated(capsys, run_folder, "--max-steps", "1e1")[-2] == "length: mean 10.00, std 0.00, min 10, max 10"
    checkpoint = torch.load(max((run_folder / "checkpoints").iterdir()), weights_only=True)
    checkpoint["args"]["max_test_steps"] = 20
    torch.save(checkpoint, tmp_path / "update_00000002.ckpt")
    assert evaluated(capsys, tmp_path / "update_00000002.ckpt")[-2].startswith("length: mean 20.00")


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
