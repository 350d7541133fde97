"""The processes of a run: how they meet, and how one finds out which of the others is gone."""

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from tqdm import tqdm

from rl.processes.ranks import Ranks

PAUSE = 0.02  # seconds between two looks at the store
LARGEST_VALUE = 8_000_000  # bytes that the store takes at once


class Place(NamedTuple):
    """Where a process runs."""

    host: str
    process_id: int


class Peers:
    """The processes of a run, each with a rank.

    Args:
        rank: of this process.
        places: where each rank runs.
        store: of this attempt; a connection of its own, so that it answers while the main one waits.
        timeout: seconds that a process waits for another.
    """

    def __init__(self, rank: int, places: list[Place], store: Store, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.places = places
        self.store = store
        self.store_is_lost = False

    def died(self) -> list[int]:
        """Return the ranks on this host whose process ended without saying goodbye."""
        return [rank for rank in self._others() if self._state(rank) == "gone" and not self._has(f"goodbye/{rank}")]

    def left(self) -> list[int]:
        """Return the ranks that ended by themselves."""
        return [rank for rank in self._others() if self._has(f"goodbye/{rank}")]

    def stopped(self) -> list[int]:
        """Return the ranks on this host whose process was stopped (SIGSTOP)."""
        return [rank for rank in self._others() if self._state(rank) == "stopped"]

    def silent(self) -> list[int]:
        """Return the ranks that do not wait for the others as this one does; it takes a moment to know."""
        self._ask(lambda: self.store.set(f"waiting/{self.rank}", ""))
        time.sleep(2)
        if self.store_is_lost:  # with the network: nobody on another host can be heard
            return [rank for rank in self._others() if self.places[rank].host != self.places[self.rank].host]
        return [rank for rank in self._others() if not self._has(f"waiting/{rank}")]

    def say_goodbye(self) -> None:
        """Let the others know that this process ends by itself."""
        self._ask(lambda: self.store.set(f"goodbye/{self.rank}", ""))

    def may_speak(self, topic: str = "end") -> bool:
        """Whether this process is the first that has something to say on a topic, such as why the run ends."""
        return self._ask(lambda: self.store.add(f"speakers/{topic}", 1)) in (1, None)  # a lost store answers nothing

    def leave(self, key: str, content: bytes) -> None:
        """Leave something in the store for rank 0, unless it is too large for that."""
        if len(content) < LARGEST_VALUE:
            self._ask(lambda: self.store.set(f"{key}/{self.rank}", content))

    def collect(self, key: str, patience: float) -> list[bytes] | None:
        """Return what the others leave in the store, in the order of their ranks; None if one of them does not.

        Args:
            key: under which they leave it.
            patience: seconds to wait for those that are still alive.
        """
        keys = [f"{key}/{rank}" for rank in self._others()]
        deadline = time.monotonic() + patience
        while not self._has(*keys):
            if self.store_is_lost or self.died() or time.monotonic() > deadline:
                return None
            time.sleep(PAUSE)
        return self._ask(lambda: [self.store.get(key) for key in keys])

    def show_life(self) -> None:
        """Let the others, if there are any, see that this process is alive, every second until all are ready."""

        def beat() -> None:
            with suppress(RuntimeError):  # the store is lost with the launcher, which ends this process, too
                for number in count():
                    self.store.set(f"alive/{self.rank}", str(number))
                    if self.store.check([f"ready/{rank}" for rank in range(len(self.places))]):
                        return
                    time.sleep(1)

        if self._others():
            Thread(target=beat, daemon=True).start()

    def wait_until_all_are_ready(self) -> None:
        """Wait until all processes are ready to train, however long they compile or repeat episodes.

        They wait in the store, since a collective has only the patience for a rollout. A process that is dead, or that
        has not shown life for as long as a rollout may take, is not waited for.

        Raises:
            RuntimeError: if a process ended.
            TimeoutError: if one does not show that it lives.
        """
        self._ask(lambda: self.store.set(f"ready/{self.rank}", ""), self.timeout)
        last_beats = {rank: (b"", time.monotonic()) for rank in self._others()}
        ready = [f"ready/{rank}" for rank in last_beats]
        looks = count()
        while not self._ask(lambda: self.store.check(ready), self.timeout):
            if self.store_is_lost:
                raise TimeoutError("the launcher does not answer before the first update")
            time.sleep(5 * PAUSE)
            if next(looks) % 10:
                continue
            gone = {*self.died(), *self.left()}
            for rank in (rank for rank in last_beats if not self._has(f"ready/{rank}")):
                if rank in gone:
                    raise RuntimeError("Connection to a process lost before all were ready")
                beat = self._ask(lambda key=f"alive/{rank}": self.store.get(key)) if self._has(f"alive/{rank}") else b""
                if beat != last_beats[rank][0]:
                    last_beats[rank] = beat, time.monotonic()
                if time.monotonic() - last_beats[rank][1] > self.timeout:
                    raise TimeoutError(f"{self.name([rank])} does not answer before the first update")

    def name(self, ranks: list[int]) -> str:
        """Return words for some ranks."""
        names = [f"rank {rank} (process {self.places[rank].process_id} on {self.places[rank].host})" for rank in ranks]
        return ", ".join(names)

    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.places)) if rank != self.rank]

    def _state(self, rank: int) -> str:
        """Return gone, stopped, or running, which is also said of processes that cannot be seen from here."""
        if self.places[rank].host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return "running"
        try:
            letter = Path(f"/proc/{self.places[rank].process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "running")

    def _has(self, *keys: str) -> bool:
        return bool(self._ask(lambda: self.store.check(list(keys))))

    def _ask(self, question: Callable[[], Any], patience: float = 2) -> Any:
        """Return the store's answer, None if it is out of reach; it is not asked again then."""
        if self.store_is_lost:
            return None
        answers: SimpleQueue[Any] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except RuntimeError:
                answers.put(None)

        Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=patience)
        except Empty:
            self.store_is_lost = True
            return None


_peers: Peers | None = None
_missing: list[int] = []


def known_peers() -> Peers | None:
    """Return the processes of this run, once they have met."""
    return _peers


def say_first(topic: str, message: str) -> None:
    """Print one line for the user, if no other process has said something on this topic."""
    if _peers is None or _peers.may_speak(topic):
        tqdm.write(message, file=sys.stderr)


def missing_peers() -> list[int]:
    """Return the ranks that this process still waited for when it last looked."""
    return _missing


def join(ranks: Ranks, backend: str, timeout: float, device: torch.device | None = None) -> None:
    """Meet the other processes and form the process group of all.

    Args:
        ranks: of this process.
        backend: of the group, gloo or nccl.
        timeout: seconds that a process waits for another, here and in every collective.
        device: the GPU of this process, for NCCL.

    Raises:
        TimeoutError: if not all processes came.
    """
    global _peers
    patience = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    attempt, places = _meet(store, ranks, timeout)
    _peers = Peers(ranks.rank, places, PrefixStore(attempt, store.clone()), timeout)
    _peers.show_life()
    dist.init_process_group(
        backend,
        store=PrefixStore(attempt, store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=patience,
        device_id=device if backend == "nccl" else None,
    )


def _meet(store: Store, ranks: Ranks, timeout: float) -> tuple[str, list[Place]]:
    """Wait for all processes; return a name for this attempt, and where each rank runs.

    The launcher's store outlives a restart, and with it what processes wrote that have died since. So rank 0 gives
    every attempt a new name. The others sign it, again if it changes, and rank 0 shows the signatures: who finds its
    own among them knows that the name is not an old one.
    """
    global _missing
    others = range(1, ranks.world_size)
    signature = f"{socket.gethostname()} {os.getpid()} {uuid4().hex}"
    attempt = uuid4().hex if ranks.rank == 0 else ""
    if ranks.rank == 0:
        store.set("attempt", attempt)
    signatures: list[str] = []
    deadline = time.monotonic() + timeout
    while signature not in signatures:
        if ranks.rank == 0:
            _missing = [rank for rank in others if not store.check([f"{attempt}/{rank}"])]
            if not _missing:
                signatures = [signature, *(store.get(f"{attempt}/{rank}").decode() for rank in others)]
                store.set(f"{attempt}/met", "\n".join(signatures))
        elif store.check(["attempt"]):
            if attempt != (attempt := store.get("attempt").decode()):
                store.set(f"{attempt}/{ranks.rank}", signature)
            if store.check([f"{attempt}/met"]):
                signatures = store.get(f"{attempt}/met").decode().split("\n")
        else:
            _missing = [0]
        if time.monotonic() > deadline:
            who = ", ".join(f"rank {rank}" for rank in _missing) or "another rank"
            raise TimeoutError(f"{who} did not start within {timeout:g} s")
        time.sleep(PAUSE)
    _missing = []
    return attempt, [Place(host, int(process_id)) for host, process_id, _ in map(str.split, signatures)]
