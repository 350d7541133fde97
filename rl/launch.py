"""How a process learns its rank, ends on a mistake of the user's, and leaves at the end."""

import ctypes
import gc
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TextIO

from tqdm import tqdm

# Both `torchrun` and `fabric run` set all of these, plain `python` none.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class RunError(Exception):
    """Ends the run, with one line that says what went wrong and what to do."""


class Ranks(NamedTuple):
    """The place of this process among all processes, and among those of this machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read_ranks() -> Ranks:
    """Read the place of this process from the launcher's environment variables.

    Plain `python` is a world of one process: the variables are then set, so that what reads them later
    (`torch.distributed`) finds the same world.

    Raises:
        SystemExit: if only some of the variables are set, or they name no process.
    """
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if len(missing) == len(LAUNCH_VARIABLES):
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0"
        )
    elif missing:
        fail(f"the launcher's variable {missing[0]} is not set: start with `torchrun`, `fabric run` or plain `python`")
    values = [os.environ[name] for name in LAUNCH_VARIABLES[:4]]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[2]):
        fail(f"the launcher's variables {', '.join(LAUNCH_VARIABLES[:4])} name no process: {', '.join(values)}")
    return Ranks(*map(int, values))


class Voice:
    """A stream that falls silent where nobody listens any more, as after `2>&1 | head`, instead of ending the run.

    Args:
        stream: stdout or stderr; None if it was closed before the start.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (it stays open to the end)

    def write(self, text: str) -> int:
        """Write, if anybody listens."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody listens."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_voice() -> None:
    """Let no training end because stdout or stderr is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # takes its number, which else the next file would get, and our lines with it
    sys.stdout, sys.stderr = Voice(sys.stdout), Voice(sys.stderr)


def end_with_launcher() -> None:
    """Have this process killed when its launcher dies, so that none is left behind (Linux only)."""
    if sys.platform == "linux" and int(os.environ["WORLD_SIZE"]) > 1:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def is_rank_zero() -> bool:
    """Whether this process is the one that talks to the user; without a whole launch every process does."""
    return os.environ["RANK"] == "0" if all(name in os.environ for name in LAUNCH_VARIABLES) else True


def say(message: str) -> None:
    """Print one line for the user, once for all processes."""
    if is_rank_zero():
        tqdm.write(message, file=sys.stderr)  # above a progress bar, if there is one
        sys.stderr.flush()


def fail(message: str) -> NoReturn:
    """End this process for a mistake that every rank of a machine sees alike: the first says what, in one line.

    Raises:
        SystemExit: always, with code 1.
    """
    wait_for_rank_zero()
    if is_rank_zero() or os.environ["LOCAL_RANK"] == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def wait_for_rank_zero() -> None:
    """Let rank 0 print first: the launcher ends all processes as soon as one has failed."""
    if not is_rank_zero():
        time.sleep(2)


def leave() -> None:
    """Leave the process group; call it after `main` has returned.

    A DistributedDataParallel module that is still alive holds the group's threads, and the interpreter may then
    abort at its exit. So garbage (such a module sits in reference cycles) is collected first.
    """
    import torch.distributed as dist  # here, so that `--help` need not wait for torch

    gc.unfreeze()  # what was there before the first update, too
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
