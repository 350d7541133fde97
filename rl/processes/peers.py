"""The processes of a run: how they meet, and how one finds out which of the others is gone."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from rl.processes.ranks import Ranks

PAUSE = 0.02  # seconds between two looks at the store
LARGEST_VALUE = 8_000_000  # bytes that the store takes at once


class Address(NamedTuple):
    """Where a process runs."""

    host: str
    process_id: int


class Peers:
    """The processes of a run, each with a rank.

    They talk through the store of the launcher, which outlives any of them.

    Args:
        ranks: of this process.
        timeout: seconds that a process waits for another.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = ranks.rank, ranks.world_size, timeout
        self.addresses: list[Address] = []  # of all ranks, once they have met
        self.missing: list[int] = []  # the ranks that this process still waits for
        self.store_is_lost = False

    def meet(self) -> None:
        """Wait for all processes, and let what forms a process group afterwards find a new store.

        The launcher's store outlives a restart, and with it what processes wrote that have died since. So rank 0 gives
        every attempt a new name and a new store. Every other rank leaves a signature under that name, again if the name
        changes, and rank 0 shows all signatures: a rank that finds its own among them knows that the name is new.

        `init_process_group` and `Fabric` read from the environment where the store is.

        Raises:
            TimeoutError: if not all processes came.
        """
        self.launchers, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=self.timeout)))
        signature = f"{socket.gethostname()} {os.getpid()} {uuid4().hex}"
        attempt, answer = "", ""
        if self.rank == 0:
            host = _own_address()
            self.own_store = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            attempt = uuid4().hex
            self.launchers.set("attempt", attempt)
        deadline = time.monotonic() + self.timeout
        while signature not in answer:
            if self.rank == 0:
                others = range(1, self.world_size)
                self.missing = [rank for rank in others if not self.launchers.check([f"{attempt}/{rank}"])]
                if not self.missing:
                    signatures = [signature, *(self.launchers.get(f"{attempt}/{rank}").decode() for rank in others)]
                    answer = "\n".join([f"{host} {self.own_store.port}", *signatures])
                    self.launchers.set(f"{attempt}/met", answer)
            elif self.launchers.check(["attempt"]):
                if attempt != (attempt := self.launchers.get("attempt").decode()):
                    self.launchers.set(f"{attempt}/{self.rank}", signature)
                if self.launchers.check([f"{attempt}/met"]):
                    answer = self.launchers.get(f"{attempt}/met").decode()
            else:
                self.missing = [0]
            if time.monotonic() > deadline:
                who = ", ".join(f"rank {rank}" for rank in self.missing) or "another rank"
                raise TimeoutError(f"{who} did not start within {self.timeout:g} s")
            time.sleep(PAUSE if signature not in answer else 0)
        self.missing = []
        store_address, *signatures = answer.split("\n")
        self.addresses = [Address(host, int(process_id)) for host, process_id, _ in map(str.split, signatures)]
        # A connection of its own, so that it answers while another thread waits on the first one.
        self.store: Store = PrefixStore(attempt, self.launchers.clone())
        host, port = store_address.split()
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
        self._show_life()

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
            return [rank for rank in self._others() if self.addresses[rank].host != self.addresses[self.rank].host]
        return [rank for rank in self._others() if not self._has(f"waiting/{rank}")]

    def say_goodbye(self) -> None:
        """Let the others know that this process ends by itself."""
        self._ask(lambda: self.store.set(f"goodbye/{self.rank}", ""))

    def may_speak(self, topic: str = "end") -> bool:
        """Whether this process is the first that has something to say on a topic, such as why the run ends."""
        return self._ask(lambda: self.store.add(f"speakers/{topic}", 1)) in (1, None)  # a lost store answers nothing

    def deposit(self, key: str, content: bytes) -> None:
        """Leave something in the store for rank 0, unless it is too large for that."""
        if len(content) < LARGEST_VALUE:
            self._ask(lambda: self.store.set(f"{key}/{self.rank}", content))  # type: ignore[arg-type]  # bytes it takes, too

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

    def _show_life(self) -> None:
        """Let the others, if there are any, see that this process is alive, every second until all are ready."""

        def beat() -> None:
            with suppress(RuntimeError):  # the store is lost with the launcher, which ends this process, too
                for number in count():
                    self.store.set(f"alive/{self.rank}", str(number))
                    if self.store.check([f"ready/{rank}" for rank in range(self.world_size)]):
                        return
                    time.sleep(1)

        if self._others():
            Thread(target=beat, daemon=True).start()

    def wait_until_all_are_ready(self) -> None:
        """Wait until all processes are ready to train, however long they compile or repeat episodes.

        They wait in the store, since a collective has only the patience for a rollout. A process that is dead, or that
        has not shown life for as long as a rollout may take, is not waited for.

        Raises:
            ConnectionError: if a process ended.
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
                    raise ConnectionError("a process ended before all were ready")
                key = f"alive/{rank}"
                beat = self._ask(partial(self.store.get, key)) if self._has(key) else b""
                if beat != last_beats[rank][0]:
                    last_beats[rank] = beat, time.monotonic()
                if time.monotonic() - last_beats[rank][1] > self.timeout:
                    raise TimeoutError(f"{self.name([rank])} does not answer before the first update")

    def name(self, ranks: list[int]) -> str:
        """Return words for some ranks."""
        names = [
            f"rank {rank} (process {self.addresses[rank].process_id} on {self.addresses[rank].host})" for rank in ranks
        ]
        return ", ".join(names)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _state(self, rank: int) -> str:
        """Return gone, stopped, or running, which is also said of processes that cannot be seen from here."""
        if self.addresses[rank].host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return "running"
        try:
            letter = Path(f"/proc/{self.addresses[rank].process_id}/stat").read_text().rpartition(")")[2].split()[0]
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
            except RuntimeError as error:
                self.store_is_lost |= isinstance(error, dist.DistNetworkError)
                answers.put(None)

        Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=patience)
        except Empty:
            self.store_is_lost = True
            return None


def _own_address() -> str:
    """Return an address of this host at which the other processes reach it: the one that the launcher is reached from.

    Where the launcher's store is on this host, it is the store's own address.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not port:
        return master  # plain `python`: nobody else is there
    with socket.create_connection((master, port)) as connection:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    return master if here == there else here
