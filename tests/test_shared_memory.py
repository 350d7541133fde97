"""Sums in shared memory are gloo's sums; who waits in vain learns of it; nothing is left over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.launching import BIN, ROOT, WORKERS, run
from tests.workers.shared_sums import CHECKS, CHECKS_OF_THREE, PATIENCE


@contextmanager
def ranks(world_size: int, folder: Path, *flags: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the ranks without a launcher, which would end them all when one ends."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKERS / "shared_sums.py"), str(folder), str(rank), str(world_size), *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def findings(world_size: int, folder: Path) -> tuple[list[dict[str, str]], str]:
    """What each rank found out, and what all of them said."""
    with ranks(world_size, folder) as processes:
        output = "".join(process.communicate(timeout=300)[0] for process in processes)
        assert [process.returncode for process in processes] == [0] * world_size, output
    return [json.loads((folder / f"results-{rank}").read_text()) for rank in range(world_size)], output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], str]:
    return findings(2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_every_rank(results: tuple[list[dict[str, str]], str], check: str) -> None:
    for rank, found in enumerate(results[0]):
        assert found.get(check, "not reached") == "", f"rank {rank}: {found.get(check)}"


def test_two_of_three_processes_sum_in_shared_memory_and_three_do_not(tmp_path: Path) -> None:
    results, output = findings(3, tmp_path)
    assert results == [{check.__name__: "" for check in CHECKS_OF_THREE}] * 3, output


def test_says_that_it_steps_aside_and_nothing_else(results: tuple[list[dict[str, str]], str]) -> None:
    lines = results[1].splitlines()
    assert lines
    for line in lines:
        assert line.startswith("going on with gloo: sums in shared memory are wrong ")


@pytest.mark.parametrize(
    ("what", "step", "error"),
    [
        ("killed", "backward", "a process is gone"),
        ("stopped", "brief sum", "timed out"),
        ("left", "destroy", "a process is gone"),
    ],
)
def test_who_waits_in_vain_ends_soon(tmp_path: Path, what: str, step: str, error: str) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    with ranks(2, tmp_path, step) as (waiting, other):
        for process in (waiting, other):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if what != "left":
            os.kill(other.pid, signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        begin = time.monotonic()
        output, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 1
        assert f"DistBackendError: shared memory: {error}" in output
        assert time.monotonic() - begin < PATIENCE.total_seconds()  # most of it is the end of Python
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_a_signal_reaches_who_waits(tmp_path: Path) -> None:
    with ranks(2, tmp_path, "backward") as (waiting, other):
        for process in (waiting, other):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        waiting.terminate()
        output, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 7, output


def test_fabric_sums_in_shared_memory(tmp_path: Path) -> None:
    """With the plain `Fabric()` that `fabric run` launches."""
    flags = ["--accelerator=cpu", "--strategy=ddp", "--devices=2"]
    command = [str(BIN / "fabric"), "run", *flags, str(WORKERS / "shared_fabric.py")]
    finished = run(command, cwd=tmp_path, timeout=120, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1"]
