"""What `rl.evaluate` and `rl.export` make of a run's checkpoint, and of what is none."""

import copy
import os
import pickle
import re
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch

import rl.evaluate
import rl.export
from rl.args import TorchArgs
from rl.environments.collector import Collector
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.ppo.prepare import prepare_batch
from rl.run import checkpoints
from rl.run.checkpoints import Checkpoints
from rl.run.ending import Ending
from rl.run.resuming import load_agent
from tests.pendulum_run import EPISODES, LAST_LINE, SEED, clipped_on_average, policy, slow_returns, steepen

exports = pytest.mark.processes  # an export takes some ten seconds


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run that saw two rollouts and took no gradient step."""
    folder = tmp_path_factory.mktemp("run")
    kwargs = ("g=9.0", "max_episode_steps=60")
    args = TorchArgs(
        env_id="Pendulum-v1", env_kwargs=kwargs, normalize_observations=True, num_steps=256, total_timesteps=512
    )
    with mock.patch.dict(os.environ), mock.patch.object(checkpoints, "ending", Ending()):
        collector, written = Collector(args, 0, 1), Checkpoints(folder, args, None)
        torch.manual_seed(0)
        agent = Agent(collector.observation_space, collector.action_space, args)
        for update in (1, 2):
            prepare_batch(collector.collect(agent, update)[0], agent, args)
            written.add(update, agent.state_dict(), torch.optim.Adam(agent.parameters()), {}, collector)
    return folder


@pytest.fixture(scope="module")
def steep(run_folder, tmp_path_factory):
    return steepen(run_folder, tmp_path_factory.mktemp("steep"))


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
    mean_return = float(re.search(r"mean_return=(\S+)", capsys.readouterr().out)[1])
    files = sorted(folder.glob("*.mp4"))
    assert np.mean([float(file.stem.partition("-return-")[2]) for file in files]) == pytest.approx(mean_return, abs=0.1)
    assert len(files) == 2
    for file in files:
        frames = imageio_ffmpeg.read_frames(str(file))
        width, height = next(frames)["size"]
        pictures = [np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in frames]
        assert len(pictures) == 61  # before, between and after 60 steps
        assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 50  # the pendulum has moved
        assert pictures[0].std() > 10
    assert files[0].read_bytes() != files[1].read_bytes()


@exports
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
    rng, std = np.random.default_rng(5), np.exp(weights["distribution.log_std"]).item()
    for batch in (1, 2, 500):
        angles, speeds = rng.uniform(-np.pi, np.pi, batch), rng.uniform(-8, 8, batch)
        observations = np.stack([np.cos(angles), np.sin(angles), speeds], 1).astype(np.float32)
        (actions,) = session.run(None, {"observation": observations})
        unclipped = policy(weights, observations.astype(np.float64))
        truth = [[clipped_on_average(mean, std)] for mean in unclipped[:, 0]]
        assert (actions.shape, actions.dtype) == ((batch, 1), np.float32)
        np.testing.assert_allclose(actions, truth, rtol=1e-4, atol=1e-4)
    assert (np.abs(unclipped) > 2).mean() > 0.1 and (np.abs(unclipped) < 2).mean() > 0.1
    assert 1.9 < np.abs(actions).max() <= 2


@exports
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


@exports
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
    assert f"{file} is no checkpoint of ours: it lacks acting_weights, best_return, environments, global_step" in line


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
