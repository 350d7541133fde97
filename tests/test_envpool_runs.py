"""Runs with EnvPool train, test, and go on."""

import re
import sys
from functools import partial

import pytest

from benchmarks.runs import run_folders, scalars
from tests.launching import ROOT, run, torchrun

REASON = "EnvPool is optional: requirements-envpool.txt"


ENVPOOL = ["--env-backend=envpool", "--num-steps=256", "--total-timesteps=1024", "--test-episodes=2"]
SCRIPTS = {
    "torch, 2 processes": partial(torchrun, 2, "train_torch.py"),
    "decoupled": partial(torchrun, 2, "train_fabric_decoupled.py"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_with_envpool_trains_tests_and_goes_on_with_new_episodes(name, tmp_path):
    pytest.importorskip("envpool", reason=REASON)
    command = SCRIPTS[name]
    flags = [*ENVPOOL, "--env-threads=2", "--num-envs=8", "--keep-checkpoints=9", "--normalize-rewards"]
    finished = run(command(*flags), tmp_path, timeout=120)
    assert finished.returncode == 0, finished.output
    (folder,) = run_folders(tmp_path)
    logged = scalars(folder)
    assert [value for _, value in logged["Rewards/rew_avg"]] == [value for _, value in logged["Game/ep_len_avg"]]
    assert len(logged["Loss/policy_loss"]) == 4

    (folder / "checkpoints" / "update_00000004.ckpt").unlink()
    resumed = run(command("--resume", str(folder)), tmp_path, timeout=120)
    assert resumed.returncode == 0, resumed.output
    words = (
        "EnvPool's environments cannot be put back: from here on the run is not bit for bit the one that was stopped"
    )
    assert resumed.stderr.splitlines().count(words) == 1
    assert (folder / "checkpoints" / "update_00000004.ckpt").exists()

    evaluated = run([sys.executable, "-m", "rl.evaluate", str(folder), "--episodes=2"], ROOT, timeout=60)
    assert re.search(r"^mean_return=[\d.]+ std_return=[\d.]+ episodes=2$", evaluated.stdout, re.MULTILINE)
