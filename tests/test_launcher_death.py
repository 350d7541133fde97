"""Nothing is left behind when the launcher dies."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import fabric_run, torchrun

DDP = ("--accelerator=cpu", "--strategy=ddp")
LIMIT = 2  # seconds


def children(process_id):
    """The processes that a launcher started, alive."""
    listed = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(child) for child in listed.split() if is_alive(int(child))]


def is_alive(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(torchrun(2, "train_torch.py", "--total-timesteps=200000"), id="torchrun"),
        pytest.param(fabric_run(2, "train_fabric.py", "--total-timesteps=200000", options=DDP), id="fabric run"),
    ],
)
def test_ranks_end_with_a_launcher_that_is_killed(command, tmp_path):
    with open(tmp_path / "output", "w+b") as output:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        ranks = []
        try:
            deadline = time.monotonic() + 60
            while b", update " not in (tmp_path / "output").read_bytes():
                assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
                time.sleep(0.2)
            ranks = children(launcher.pid)
            assert len(ranks) == 2
            launcher.kill()
            time.sleep(LIMIT)
            assert not [rank for rank in ranks if is_alive(rank)]
        finally:
            for process_id in (launcher.pid, *ranks):
                if is_alive(process_id):
                    os.kill(process_id, signal.SIGKILL)
            launcher.wait()
