"""What a run cannot go on from is refused, and a line says why."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from rl.args import TorchArgs
from rl.environments.collector import Collector
from rl.ppo.agent import Agent
from rl.run.checkpoints import Checkpoints
from rl.run.command_line import parse
from rl.run.ending import ending
from rl.run.resuming import load_checkpoint, restore_environments, restore_learner, run_args
from rl.voice import RunError

ARGS = TorchArgs(num_envs=2, num_steps=64, total_timesteps=256)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An agent, its optimizer and its environments, and the checkpoint that they left after an update."""
    folder = tmp_path_factory.mktemp("run")
    collector = Collector(ARGS, rank=0, world_size=1)
    agent = Agent(collector.observation_space, collector.action_space, ARGS)
    optimizer = torch.optim.Adam(agent.parameters())
    rollout, _ = collector.collect(agent, 1)
    sum(map(torch.sum, agent(rollout.observations, rollout.actions))).backward()
    optimizer.step()
    with mock.patch.dict(os.environ), mock.patch.object(ending, "save"), mock.patch.object(ending, "run_folder"):
        checkpoints = Checkpoints(folder, ARGS, gather=None)
        checkpoints.add(1, agent.state_dict(), optimizer, {"Loss/loss": 0.5}, collector)
        checkpoints.write_last()
    yield (agent, optimizer, collector), folder / "checkpoints" / "update_00000001.ckpt"
    collector.close()


@pytest.fixture
def learner(run):
    return run[0]


@pytest.fixture
def path(run, tmp_path):
    """A copy of the checkpoint."""
    return Path(shutil.copy(run[1], tmp_path))


def go_on(path, learner):
    """What a run does with a checkpoint, in its order."""
    agent, optimizer, collector = learner
    checkpoint = load_checkpoint(path)
    run_args(checkpoint, TorchArgs)
    restore_learner(checkpoint, agent, optimizer)
    restore_environments(checkpoint, collector)


def packed(states):
    return [torch.frombuffer(bytearray(states), dtype=torch.uint8)]


OBJECTS = b'[{"seed": 1, "episode": 0, "actions": {"dtype": "|O", "shape": [4]}}]\n' + bytes(64)
HOSTILE = {
    "arrays of objects": ({"environments": packed(OBJECTS)}, r"damaged \(an array of object\)"),
    "no states": ({"environments": packed(b"7")}, "damaged"),
    "a state without a seed": ({"environments": packed(b'[{"episode": 0}]')}, "damaged"),
    "a seed that is none": ({"environments": packed(b'[{"seed": "PCG64", "episode": 0}]')}, "damaged"),
    "fewer environments": ({"environments": packed(b"[]")}, "fewer environments"),
    "no list of environments": ({"environments": {}}, "something else as environments"),
    "an agent that is a number": ({"agent": 5}, "something else as agent"),
    "no weights": ({"agent": {}}, "does not fit"),
    "an optimizer without groups": ({"optimizer": {}}, "does not fit"),
    "scalars that are text": ({"scalars": {"Loss/loss": "low"}}, "something else as scalars"),
    "an update that is text": ({"update": "2"}, "something else as update"),
    "arguments of another type": ({"args": {"num_envs": "two"}}, "its num_envs is 'two'"),
    "arguments out of bounds": ({"args": {"gamma": 7.0}}, "--gamma must be"),
}


def test_a_checkpoint_that_nobody_touched_is_none_of_these(path, learner):
    go_on(path, learner)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line(path, learner, name):
    changes, words = HOSTILE[name]
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises((ValueError, RunError), match=f"^.*{words}.*$"):
        go_on(path, learner)


def refusal(capsys, *flags):
    """The one line with which the command line of a run is refused."""
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
        parse(TorchArgs, list(map(str, flags)))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "Pendulum-v1"], "--env-id cannot change when a run is resumed: it is 'CartPole-v1'"),
        (["--gamma", "0.5"], "--gamma cannot change when a run is resumed: it is 0.99"),
        (
            ["--num-envs", "3"],
            "the run has 2 environments in all, not 3: choose the number of processes",
        ),
        (["--total-timesteps", "64"], "the run is complete: raise --total-timesteps to train on"),
    ],
)
def test_flags_with_which_a_run_cannot_go_on_are_refused(path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(path.parent)
    assert refusal(capsys, "--resume", path, *flags).startswith(f"error: {words}")


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "some.ckpt").write_bytes(content)
    words = "there is no run and no checkpoint some.ckpt" if content is None else "some.ckpt cannot be read"
    assert refusal(capsys, "--resume", "some.ckpt").startswith(f"error: {words}")
