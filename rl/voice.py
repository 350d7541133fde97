"""What a run says to its user: one line at a time, once for all processes."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from tqdm import tqdm

# Both `torchrun` and `fabric run` set all of these, plain `python` none.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RunError(Exception):
    """Ends the run, with one line that says what went wrong and what to do."""


class Stream:
    """A stream that falls silent where nobody reads it any more, as after `2>&1 | head`, instead of ending the run.

    Args:
        stream: stdout or stderr; None if it was closed before the start.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (it stays open to the end)

    def write(self, text: str) -> int:
        """Write, if anybody reads."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody reads."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_streams() -> None:
    """Keep the training going where stdout or stderr is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the closed descriptor's number, which else the next file would get, and our lines with it.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = cast("TextIO", Stream(sys.stdout)), cast("TextIO", Stream(sys.stderr))


def is_rank_zero() -> bool:
    """Whether this process is the one that talks to the user; without a whole launch every process does."""
    return os.environ["RANK"] == "0" if all(name in os.environ for name in LAUNCH_VARIABLES) else True


def write_line(message: str) -> None:
    """Print one line on stderr, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def say(message: str) -> None:
    """Print one line for the user, once for all processes."""
    if is_rank_zero():
        write_line(message)


def say_first(topic: str, message: str) -> None:
    """Print one line for the user, if no other process has said something on this topic."""
    if _is_first(topic):
        write_line(message)


def ask_before_speaking(is_first: Callable[[str], bool]) -> None:
    """Let `say_first` ask this function whether no other process has spoken on a topic."""
    global _is_first
    _is_first = is_first


def fail(message: str) -> NoReturn:
    """End this process for a mistake that every rank of a machine sees alike: the first says what, in one line.

    Raises:
        SystemExit: always, with code 1.
    """
    wait_for_rank_zero()
    if is_rank_zero() or os.environ["LOCAL_RANK"] == "0":
        write_line(f"error: {message}")
    sys.exit(1)


def wait_for_rank_zero() -> None:
    """Let rank 0 print first: the launcher ends all processes as soon as one has failed."""
    if not is_rank_zero():
        time.sleep(2)


def _alone(topic: str) -> bool:
    return True


_is_first: Callable[[str], bool] = _alone
_given_up: set[str] = set()


@contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Go on where the disk does not take something; one line says so, once."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Lightning's logger wraps it
        if not isinstance(cause, OSError):
            raise
        if what not in _given_up:
            reason = cause.strerror or " ".join(str(cause).split())[:200]
            say(f"warning: {what} cannot be written ({reason}): training goes on without")
        _given_up.add(what)


def has_given_up() -> bool:
    """Whether a line has said that the disk does not take something."""
    return bool(_given_up)
