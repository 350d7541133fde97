"""How a run ends: when it is done, on a signal, or because something broke; then with one line that says what."""

import atexit
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from types import FrameType
from typing import NoReturn, TypeVar

from tqdm import tqdm

from rl.processes.peers import Peers, known_peers, missing_peers
from rl.processes.ranks import leave
from rl.voice import RunError, is_rank_zero, say

Args = TypeVar("Args")

GRACE = 2  # seconds after a signal in which the main thread must hear of it, else another thread ends the process
LAST_WRITES = 20  # seconds after that for a checkpoint, a log and a video; a launcher kills what takes more than 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
NETWORK = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnect|[Tt]imed out|recvValue|Broken pipe")


class Stopped(BaseException):
    """Ends the run because a signal arrived."""


_exit = os._exit  # it is replaced while a script runs
_ending = Lock()  # taken by the thread that ends the process
_signal: signal.Signals | None = None
_save: Callable[[], object] | None = None
_at_end: list[Callable[[], object]] = []
_update = 0
_resumable: Path | None = None
_given_up: set[str] = set()


def run(main: Callable[[Args], None], args: Args) -> NoReturn:
    """Run the main function of a script and end the process; if it fails, with a line that says why.

    Whatever ends it, what was registered with `save_at_end`, `at_end` and `atexit` is done, in this order.
    """
    gc.disable()  # until the first update: imports and compilation leave little garbage, and a fifth is quicker without
    _listen()
    _have_exits_raise()
    threading.excepthook = _leave_to_main_thread
    code = 0
    try:
        main(args)
    except BaseException as error:
        code = _end(error)
    else:
        _ending.acquire()
        _close()
        if (peers := known_peers()) is not None:
            peers.say_goodbye()
        leave()
    atexit.register(_finish, code)
    sys.exit(code)


def save_at_end(save: Callable[[], object]) -> None:
    """Register what must be written first of all when the run is stopped or fails."""
    global _save
    _save = save


def at_end(close: Callable[[], object]) -> None:
    """Register what must be closed however the run ends; the first registered is closed first."""
    _at_end.append(close)


def updates(done: int, last: int) -> Iterator[int]:
    """Count the updates after `done`, so that a line about an error can say in which one it happened.

    The first begins when all processes are ready for it.
    """
    global _update
    if (peers := known_peers()) is not None:
        peers.wait_until_all_are_ready()
    gc.freeze()
    gc.enable()
    for update in range(done + 1, last + 1):
        _update = update
        yield update


def can_resume(run_folder: Path) -> None:
    """Remember that the run's folder holds a checkpoint, for the line about a stopped run."""
    global _resumable
    _resumable = run_folder


@contextmanager
def give_up(what: str) -> Iterator[None]:
    """Go on without what the disk does not take; one line says so, once."""
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


def _listen() -> None:
    """Have signals end the main thread with an exception, or the process if that thread hears nothing."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _hear)
    Thread(target=_watch, args=(read_end,), daemon=True).start()


def _have_exits_raise() -> None:
    """Have an environment that calls `os._exit`, which ends a process without a word, raise SystemExit instead."""
    process_id = os.getpid()

    def exit_aloud(status: int) -> None:
        if os.getpid() != process_id:
            _exit(status)  # a child that the environment forked
        raise SystemExit(f"os._exit({status})")

    os._exit = exit_aloud


def _leave_to_main_thread(failed: threading.ExceptHookArgs) -> None:
    """Print nothing about the thread that writes the log if the disk fails it: it passes the error on."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _hear(number: int, frame: FrameType | None) -> None:
    global _signal
    again, _signal = _signal is not None, signal.Signals(number)
    if not again and not _ending.locked():
        raise Stopped


def _watch(read_end: int) -> None:
    """End the process if the main thread cannot, because it waits for a process that does not answer."""
    global _signal
    number = os.read(read_end, 1)[0]
    time.sleep(GRACE)
    Thread(target=_exit_later, args=(128 + number,), daemon=True).start()
    if not _ending.locked():
        _signal = signal.Signals(number)
        _finish(_end(Stopped()))


def _exit_later(code: int) -> None:
    time.sleep(LAST_WRITES)
    _exit(code)


def _end(error: BaseException) -> int:
    """Save the run, say why it ends, unless another process did, and close what is open; return the exit code."""
    if not _ending.acquire(blocking=False):
        Event().wait()  # another thread is ending the process
    message, code = _explain(error)
    if _save is not None:
        _try(_save)
    if message and message.startswith("stopped") and _resumable and _resumable.exists():
        message += f"; go on with --resume {_resumable}"
    peers = known_peers()
    if message and (peers is None or peers.may_speak()):
        tqdm.write(message, file=sys.stderr)
        if not isinstance(error, (RunError, Stopped)) and message.startswith("error: unexpected"):
            traceback.print_exception(error)
    if peers is not None:
        peers.say_goodbye()
    _close()
    return code


def _finish(code: int) -> NoReturn:
    """End this process without taking down the interpreter: that lasts seconds, and a broken group could hold it up.

    What was registered with `atexit` is done before.
    """
    atexit.unregister(_finish)
    os._exit = _exit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _exit(code)


def _explain(error: BaseException) -> tuple[str | None, int]:
    """Return the line that says what ended the run, None if there is nothing to say, and the exit code."""
    peers = known_peers()
    where = f"in update {_update}" if _update else "before the first update"
    if isinstance(error, SystemExit) and peers is None:
        return None, 1  # `fail` has said why; later nothing of ours exits so
    if isinstance(error, RunError):
        rank = f"rank {peers.rank}, " if peers is not None and len(peers.places) > 1 else ""
        return f"error: {error} ({rank}{where.removeprefix('in ')})", 1
    # A process that is gone breaks the connections of the others, and the launcher then sends them a signal.
    is_network = isinstance(error, RuntimeError) and NETWORK.search(str(error)) is not None
    if peers is not None and (is_network or isinstance(error, Stopped)):
        if culprits := _culprits(peers):
            return f"error: {culprits} {where}", 1
        if _signal is None and peers.left():
            return None, 1  # that one has said why
    if _signal is not None:
        if missing := missing_peers():
            return f"error: rank {', '.join(map(str, missing))} had not started when {_signal.name} arrived", 1
        return f"stopped by {_signal.name} {where}" if is_rank_zero() else None, 128 + _signal
    if is_network and peers is not None:
        silent = peers.name(peers.silent()) or "another process"
        if "imed out" not in str(error):
            return f"error: the connection to {silent} broke {where}", 1
        return f"error: {silent} does not answer {where}; if it is only slow, raise --timeout", 1
    if isinstance(error, TimeoutError):
        return f"error: {error}", 1
    if isinstance(error, RuntimeError) and "non-finite" in str(error):  # as clipping says it
        return f"error: the gradient is NaN or infinite {where}; the last checkpoint is from before", 1
    reason = " ".join(str(error).split())
    return f"error: unexpected {type(error).__name__} {where}: {reason}", 1


def _culprits(peers: Peers) -> str:
    """Return who died or is stopped, if anybody; a death may show a moment later than its consequences."""
    deadline = time.monotonic() + GRACE / 2
    while not (died := peers.died()) and not peers.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    if died:
        return f"{peers.name(died)} died"
    if stopped := peers.stopped():
        return f"{peers.name(stopped)} is stopped and does not answer"
    return ""


def _close() -> None:
    while _at_end:
        _try(_at_end.pop(0))


def _try(close: Callable[[], object]) -> None:
    try:
        close()
    except Exception as error:  # the others must be closed all the same
        if not (_given_up and isinstance(error, OSError)):  # else a line has said so
            say(f"warning: {getattr(close, '__qualname__', close)} failed: {error}")
