"""Launch the scripts for real: each run in processes of its own, with a hard limit in time and none left behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import pytest

from benchmarks.launches import BIN, Launch, free_port, launched

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "workers"

Answer = TypeVar("Answer")


class Running(NamedTuple):
    """A launch that runs; what `run` is told to do meanwhile may look at it and disturb it."""

    launch: Launch
    cwd: Path
    files: tuple[IO[bytes], IO[bytes]]

    @property
    def process(self) -> subprocess.Popen:
        return self.launch.process

    @property
    def output(self) -> str:
        return "".join(map(_text, self.files))

    def wait_for(self, text: str) -> None:
        """Wait until the launch has written a text."""
        self._wait(lambda: text in self.output, repr(text))

    def rank(self, rank: int) -> int:
        """The process id of a rank, as soon as a launcher has started it."""
        return self._wait(lambda: self.launch.find_rank(rank), f"rank {rank}")

    def _wait(self, look: Callable[[], Answer | None], what: str, patience: float = 120) -> Answer:
        found = self.launch.wait_for(look, patience)
        assert found, f"no {what} before the end, or within {patience} s\n{self.output}"
        return found


class Finished(NamedTuple):
    """A launch that has ended by itself."""

    command: list[str]
    cwd: Path
    returncode: int
    stdout: str
    stderr: str
    seconds: float  # since it was started or, where something was done meanwhile, since that was done
    left: list[str]  # command lines of processes that outlived the launcher; they were killed
    seen: Any  # what was returned by what was done meanwhile

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def python(script: str | Path, *flags: str) -> list[str]:
    """The command for one process. Relative scripts are those of the repository, here and below."""
    return [sys.executable, str(ROOT / script), *flags]


def torchrun(processes: int, script: str | Path, *flags: str, options: tuple[str, ...] = ()) -> list[str]:
    launcher = [str(BIN / "torchrun"), f"--nproc_per_node={processes}", "--standalone", *options]
    return [*launcher, str(ROOT / script), *flags]


def fabric_run(processes: int, script: str | Path, *flags: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command with a port of its own: by default two `fabric run` at once would collide."""
    launcher = [str(BIN / "fabric"), "run", *options, f"--devices={processes}", f"--main-port={free_port()}"]
    return [*launcher, str(ROOT / script), *flags]


def run(
    command: list[str],
    cwd: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[Running], Any] | None = None,
) -> Finished:
    """Run a command to its end, as `launched` starts it.

    When the time is over every process of the launch is killed, and the test fails with what they wrote. What is done
    `meanwhile` has a limit of its own, and the time begins after it.
    """
    # Files instead of pipes: a process that is left behind would keep a pipe open, and us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with launched(command, cwd, env or {}, out, err) as launch:
            start = time.perf_counter()
            seen = None
            if meanwhile:
                seen = meanwhile(Running(launch, cwd, (out, err)))
                start = time.perf_counter()
            with suppress(subprocess.TimeoutExpired):
                launch.process.wait(timeout)
            seconds = time.perf_counter() - start
            returncode = launch.process.returncode
            left = launch.left() if returncode is not None else []
        stdout, stderr = (_text(file) for file in (out, err))
    if returncode is None:
        pytest.fail(f"{' '.join(command)}\ndid not end within {timeout} s\n{stdout[-5000:]}\n{stderr[-5000:]}")
    return Finished(command, cwd, returncode, stdout, stderr, seconds, left, seen)


def assert_no_process_is_left(finished: Finished) -> None:
    assert not finished.left, f"{' '.join(finished.command)}\nleft behind: {finished.left}"


def _text(file: IO[bytes]) -> str:
    """All of a file. It is not moved to another place in it: that is where those who inherited it write."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())
