"""How a run ends: when it is done, on a signal, or because something broke; then with one line that says what."""

import atexit
import gc
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from types import FrameType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from rl.args import CommonArgs
from rl.processes.peers import Peers
from rl.processes.ranks import read_ranks
from rl.voice import RunError, ask_before_speaking, has_given_up, is_rank_zero, say, write_line

Args = TypeVar("Args", bound=CommonArgs)

GRACE = 2  # seconds after a signal in which the main thread must hear of it, else another thread ends the process
LAST_WRITES = 20  # seconds after that for a checkpoint, a log and a video; a launcher kills what takes more than 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Stopped(BaseException):
    """Ends the run because a signal arrived."""


class Ending:
    """What a run needs to end well, whenever that is; `ending` is the one of this process."""

    def __init__(self) -> None:
        self.peers: Peers | None = None  # the other processes
        self.update = 0  # the update in which the run is; 0 before the first
        self.save: Callable[[], object] | None = None  # writes the last checkpoint, before anything is closed
        self.closing = ExitStack()  # closes what is open
        self.run_folder: Path | None = None  # where to go on, once a checkpoint is there
        self._signal: signal.Signals | None = None
        self._signal_waits = False  # one that comes raises nothing yet
        self._begun = Lock()  # taken by the thread that ends the process
        self._exit = os._exit  # as it is outside of a run

    def listen(self) -> None:
        """Have signals end the main thread with an exception, or the process if that thread hears nothing."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._hear)
        Thread(target=self._watch, args=(read_end,), daemon=True).start()

    @contextmanager
    def signals_waiting(self) -> Iterator[None]:
        """Let a signal wait while a library works with its locks.

        An exception that comes just as a lock was taken leaves it taken, and closing would wait for it in vain.

        Raises:
            Stopped: after the work, if a signal came meanwhile.
        """
        self._signal_waits = True
        try:
            yield
        finally:
            self._signal_waits = False
        if self._signal is not None:
            raise Stopped

    def have_exits_raise(self) -> None:
        """Have an environment that calls `os._exit`, which ends a process without a word, raise SystemExit instead.

        Without this a run whose environment ends it so would look like a success.
        """
        process_id = os.getpid()

        def exit_aloud(status: int) -> NoReturn:
            if os.getpid() != process_id:
                self._exit(status)  # a child that the environment forked
            raise SystemExit(f"os._exit({status})")

        os._exit = exit_aloud

    def succeed(self) -> int:
        """Close what is open after all is done; return the exit code."""
        self._begun.acquire()
        self._close()
        if self.peers is not None:
            self.peers.say_goodbye()
        leave_process_group()
        return 0

    def fail(self, error: BaseException) -> int:
        """Save the run, say why it ends unless another process did, and close what is open; return the exit code."""
        if not self._begun.acquire(blocking=False):
            Event().wait()  # another thread is ending the process
        message, code = self._explain(error)
        peers = self._met()
        if self.save is not None:
            _try(self.save)
        if message and message.startswith("stopped") and self.run_folder and self.run_folder.exists():
            message += f"; go on with --resume {self.run_folder}"
        if message and (peers is None or peers.may_speak()):
            write_line(message)
            if message.startswith("error: unexpected"):
                traceback.print_exception(error)
        if peers is not None:
            peers.say_goodbye()
        self._close()
        return code

    def finish(self, code: int) -> NoReturn:
        """End this process without taking down the interpreter: that takes seconds, and a broken group could block it.

        What was registered with `atexit` is done before.
        """
        atexit.unregister(self.finish)
        os._exit = self._exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        self._exit(code)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self._signal = self._signal is not None, signal.Signals(number)
        if not again and not self._signal_waits and not self._begun.locked():
            raise Stopped

    def _watch(self, read_end: int) -> None:
        """End the process if the main thread cannot, because it waits for a process that does not answer."""
        number = os.read(read_end, 1)[0]
        time.sleep(GRACE)
        Thread(target=self._exit_later, args=(128 + number,), daemon=True).start()
        if not self._begun.locked():
            self._signal = signal.Signals(number)
            self.finish(self.fail(Stopped()))

    def _exit_later(self, code: int) -> None:
        time.sleep(LAST_WRITES)
        self._exit(code)

    def _met(self) -> Peers | None:
        return self.peers if self.peers is not None and self.peers.addresses else None

    def _explain(self, error: BaseException) -> tuple[str | None, int]:
        """Return the line that says what ended the run, None if there is nothing to say, and the exit code."""
        peers = self._met()
        where = f"in update {self.update}" if self.update else "before the first update"
        if isinstance(error, SystemExit) and peers is None:
            return None, 1  # `fail` has said why; later nothing of ours exits so
        if isinstance(error, RunError):
            rank = f"rank {peers.rank}, " if peers is not None and peers.world_size > 1 else ""
            return f"error: {error} ({rank}{where.removeprefix('in ')})", 1
        # A process that is gone breaks the connections of the others, and the launcher then sends them a signal.
        is_lost = _is_lost_connection(error)
        if peers is not None and (is_lost or isinstance(error, Stopped)):
            if culprits := _culprits(peers):
                return f"error: {culprits} {where}", 1
            if self._signal is None and peers.left():
                return None, 1  # that one has said why
        if self._signal is not None:
            if self.peers is not None and (missing := self.peers.missing):
                return f"error: rank {', '.join(map(str, missing))} had not started when {self._signal.name} arrived", 1
            return f"stopped by {self._signal.name} {where}" if is_rank_zero() else None, 128 + self._signal
        if is_lost and peers is not None:
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

    def _close(self) -> None:
        _try(self.closing.close)


ending = Ending()


def start(main: Callable[[Args], None], args: Args) -> NoReturn:
    """Meet the other processes, run the main function of a script, and end the process.

    If it fails, one line says why. Whatever ends it, the last checkpoint is written, then what is open is closed, then
    what was registered with `atexit` is done.
    """
    gc.disable()  # until the first update: imports and compilation leave little garbage, and a fifth is quicker without
    torch.set_num_threads(1)  # for each process, so that none is in the way of another
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each process is connected with every other one
    ending.listen()
    ending.have_exits_raise()
    threading.excepthook = _leave_to_main_thread
    try:
        ending.peers = Peers(read_ranks(), args.timeout)
        ending.peers.meet()
        ask_before_speaking(ending.peers.may_speak)
        main(args)
    except BaseException as error:
        code = ending.fail(error)
    else:
        code = ending.succeed()
    atexit.register(ending.finish, code)
    sys.exit(code)


def leave_process_group() -> None:
    """Leave the process group; call it after `main` has returned.

    A DistributedDataParallel module that is still alive holds the group's threads, and the interpreter may then
    abort at its exit. So garbage (such a module sits in reference cycles) is collected first.
    """
    gc.unfreeze()  # what was there before the first update, too
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_to_main_thread(failed: threading.ExceptHookArgs) -> None:
    """Print nothing about the thread that writes the log if the disk fails it: it passes the error on."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error comes from the network: PyTorch's own types, or gloo, whose errors name its source files."""
    return isinstance(error, ConnectionError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


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


def _try(last_act: Callable[[], object]) -> None:
    try:
        last_act()
    except Exception as error:  # the others must be done all the same
        if not (has_given_up() and isinstance(error, OSError)):  # else a line has said so
            say(f"warning: {getattr(last_act, '__qualname__', last_act)} failed: {error}")
