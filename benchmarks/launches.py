"""Launches that are found again: which processes belong to one, which is which rank, and the end of them all.

For `benchmarks/faults.py` and the tests. Processes are looked for in /proc, so it takes Linux.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeVar
from uuid import uuid4

Answer = TypeVar("Answer")

BIN = Path(sys.executable).parent  # not resolved: in a virtual environment python is a link

MARK = "PPO_LAUNCH"  # every process of a launch inherits this variable with a value of its own

# What a launcher, a cluster, a shell or pytest may have set and a launch must not inherit. Without XDG_RUNTIME_DIR and
# SDL_* it is as in a bare container.
UNWANTED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(LT|PL|PET|TORCHELASTIC|SLURM|OMPI|PMI|PYTEST|OMP|MKL|SDL)_.*|PYTHON[A-Z]*|XDG_RUNTIME_DIR|COLUMNS"
)


def free_port() -> int:
    """Return a port that is free now, and that no other launch of this process was given."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port not in _ports_given:
            _ports_given.add(port)
            return port


_ports_given: set[int] = set()


class Launch(NamedTuple):
    """A command that runs, and all processes that it has started."""

    process: subprocess.Popen
    mark: str

    def find_rank(self, rank: int, restarts: int = 0) -> int | None:
        """Return the process id of a rank, if the launcher has started it after so many restarts.

        What a rank has started inherits its variables, so only the launcher's own children are looked at.
        """
        variables = {f"RANK={rank}", f"TORCHELASTIC_RESTART_COUNT={restarts}"}
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with suppress(OSError):  # a process may end while we look
                for child in children.read_text().split():
                    if variables <= _variables(Path("/proc", child)):
                        return int(child)
        return None

    def wait_for(self, look: Callable[[], Answer | None], patience: float) -> Answer | None:
        """Return what `look` finds, as soon as it finds something; None if the launch has ended, or time is over."""
        deadline = time.monotonic() + patience
        while not (found := look()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                return look() or None  # it may have come just before the end
            time.sleep(0.02)
        return found

    def left(self, patience: float = 2) -> list[str]:
        """Return the command lines of the processes that still run when `patience` seconds have passed."""
        deadline = time.monotonic() + patience
        while (left := _processes_of(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(left.values())

    def kill(self) -> None:
        """Kill the launcher's group and whatever else carries its mark, then wait for the launcher."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        while left := _processes_of(self.mark):
            for process_id in left:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def launched(
    command: list[str], folder: Path, variables: Mapping[str, str], stdout: IO, stderr: IO | int
) -> Iterator[Launch]:
    """Start a command in a session of its own, with nothing inherited from another launcher; at the end it is killed.

    GPUs are hidden, so that the commands do on every machine what they do on the CPU; `variables` may show them again.
    """
    mark = uuid4().hex
    inherited = {name: value for name, value in os.environ.items() if not UNWANTED.fullmatch(name)}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | dict(variables) | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    launch = Launch(process, mark)
    try:
        yield launch
    finally:
        launch.kill()


def _processes_of(mark: str) -> dict[int, str]:
    """Return the process ids and the command lines of the launch with that mark.

    Its group is not enough: torchrun starts ranks in sessions of their own.

    Raises:
        RuntimeError: where there is no /proc.
    """
    if not Path("/proc/self/environ").exists():
        raise RuntimeError("processes are looked for in /proc, and there is none")
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look, or not be ours
            if f"{MARK}={mark}" in _variables(process):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ").strip()
    return found


def _variables(process: Path) -> set[str]:
    """Return the variables, `NAME=value`, that a process was started with, given its folder in /proc."""
    return set((process / "environ").read_text(errors="replace").split("\0"))
