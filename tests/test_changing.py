"""The examples of docs/changing.md and the changes of docs/ablation.md are patches that apply and take effect."""

import re
import shutil
import subprocess

import pytest
import torch

from benchmarks.runs import last_checkpoint, run_folders, scalars
from tests.launching import ROOT, python, run

PAGES = [(ROOT / "docs" / name).read_text() for name in ("changing.md", "ablation.md")]
EXAMPLES, TRIED = (dict(re.findall(r"^\*\*An? ([^*]+)\*\*.*?```diff\n(.*?)```", page, re.M | re.S)) for page in PAGES)
FLAGS = ["--num-steps=128", "--total-timesteps=256", "--num-envs=2", "--update-epochs=2", "--test-episodes=1"]
SPEAKING = """
import gymnasium as gym


class Speaking(gym.Env):
    observation_space, action_space = gym.spaces.Text(3), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "abc", {}

    def step(self, action):
        return "xyz" if action else "a", float(action), False, False, {}


gym.register("Speaking-v0", Speaking, max_episode_steps=10)
"""


def train(folder, patch, *flags):
    """The checkpoint of a short run of the suite with a patch."""
    shutil.copytree(ROOT / "rl", folder / "rl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_torch.py", folder)
    (folder / "speaking.py").write_text(SPEAKING)
    if patch:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=patch, text=True, check=True)
    finished = run(python(folder / "train_torch.py", *FLAGS, *flags), folder, timeout=120)
    assert finished.returncode == 0, finished.output
    return last_checkpoint(run_folders(folder)[0])


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unchanged"), "")


def test_there_is_an_example_of_each_kind_of_change():
    assert list(EXAMPLES) == ["term of the loss", "network", "optimizer", "space", "variant of the algorithm"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_applies_trains_and_takes_effect(name, unchanged, tmp_path):
    flags = ["--env-id=speaking:Speaking-v0"] if name == "space" else []
    changed = train(tmp_path, EXAMPLES[name], *flags)
    one, other = (checkpoint["agent"]["actor.0.weight"] for checkpoint in (changed, unchanged))
    assert one.isfinite().all()
    assert one.shape != other.shape if name == "space" else not torch.equal(one, other)
    assert ("actor.1.weight" in changed["agent"]) == (name == "network")
    settings = changed["optimizer"]["param_groups"][0]
    assert ("betas" in settings) == (name != "optimizer")
    assert (settings["lr"] in (1e-3, 5e-4)) == (name != "variant of the algorithm")
    logged = scalars(run_folders(tmp_path)[0])["Info/learning_rate"]
    assert logged[-1][1] == pytest.approx(settings["lr"])


STEPS = 2 * 2 * 2  # updates, epochs, minibatches


@pytest.mark.parametrize(
    ("name", "flags", "steps"),
    [
        ("advantage computed anew in each epoch", [], STEPS),
        # The ratios are 1 in the first minibatch of an update, so that the second of its four is the last.
        ("bound on the KL divergence within the epoch", ["--target-kl=1e-9", "--per-rank-batch-size=32"], 2 * 2),
        ("Adam with a local time", [], STEPS // 2),  # those of the last update
    ],
)
def test_what_was_tried_applies_trains_and_takes_effect(name, flags, steps, unchanged, tmp_path):
    changed = train(tmp_path, TRIED[name], *flags)
    one, other = (checkpoint["agent"]["actor.0.weight"] for checkpoint in (changed, unchanged))
    assert one.isfinite().all()
    assert not torch.equal(one, other)
    assert {state["step"].item() for state in changed["optimizer"]["state"].values()} == {steps}


def test_three_changes_were_tried():
    assert len(TRIED) == 3
