"""Stands in for gloo's all-reduce between processes of one host: they add up what lies in memory that all of them see.

A message to a process of one's own host takes gloo some hundred microseconds, for 40 kB of gradients as for one byte.
"""

import mmap
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, Store
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

from rl.voice import say_first

PROCESSORS = ("x86_64", "AMD64")  # each shows the others its stores in their order; elsewhere nothing promises that
KINDS = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64, torch.uint8: np.uint8}
NOTHING = np.empty(0, np.uint8)
SLOT = 2**22  # bytes that a rank lays down at once; larger tensors go in parts. What is not used takes no memory.
LINE = 16  # numbers of 8 bytes: what two processors write is never on one cache line, nor on neighbours

# How a rank waits: some 30 µs it does nothing but look, as the others are about to come. Then it leaves the core to
# others, whom it may be waiting for: it sleeps, 60 µs at least as the system has it, and up to a tenth of its wait so
# far. To yield the core would leave it less to those who have work.
LOOKS = 200
LONGEST_SLEEP = 0.0002  # seconds
CHECKING = 0.05  # seconds, until and between two checks that the other is alive and the time is not up

PROOF = (8, 10_000)  # rounds, and numbers in each
PROOF_TIMEOUT = timedelta(seconds=10)
TOLERANCE = 1e-5  # of sums over more than two ranks, since gloo adds in another order; rounding leaves 1e-6


class Member(NamedTuple):
    """A process of the group, in numbers, so that gloo can carry them."""

    rank: int  # among all processes
    process_id: int
    started: int  # tells it from a later process with this id
    descriptor: int  # of the memory, if it has made that
    token: int  # of the memory


class Done(dist._Work):
    """What was done at once.

    Args:
        tensors: the result.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return."""
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def get_future(self) -> Future:
        """Return the result as `DistributedDataParallel` wants it."""
        future: Future = Future()
        future.set_result(self.tensors)
        return future


class SharedMemoryGroup(ProcessGroup):
    """A process group that sums, broadcasts and waits in shared memory, at once, and leaves all else to gloo.

    In a round each rank lays a part of its tensor into its slot, sets its counter to the number of the round, and reads
    the slots of the others as their counters get there. A counter of n says that this rank has read all that it wants
    of round n - 1, so two slots in turn are enough. All ranks add in the order of ranks: so they get the same, and an
    element's sum does not depend on where it stands in the tensor, as it does with gloo's ring.

    A wait ends with an error after the timeout of the gloo group, and soon after the process waited for has ended.

    Args:
        group: the same processes with gloo.
        members: by their rank in the group.
        memory: of zeros.
    """

    def __init__(self, group: ProcessGroup, members: list[Member], memory: mmap.mmap) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        for device in group._device_types:  # the methods that are not defined here look there
            self._register_backend(device, ProcessGroup.BackendType.GLOO, group._get_backend(device))
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self.gloo: Any = group._get_backend(torch.device("cpu"))
        self.timeout: timedelta | None = None  # None: that of gloo
        self.members, self.me, self.round = members, group.rank(), 0
        self.others = [rank for rank in range(len(members)) if rank != self.me]
        numbers = memoryview(memory).cast("q")
        self.counters = numbers[: len(members) * LINE : LINE]
        self.have_left = numbers[1 : len(members) * LINE : LINE]
        slots = np.frombuffer(memory, np.uint8, offset=8 * LINE * len(members)).reshape(2, len(members), SLOT)
        self.slots = {kind: [list(turn) for turn in slots.view(kind)] for kind in KINDS.values()}

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Sum over all ranks, in place; other operations are gloo's."""
        opts = opts or dist.AllreduceOptions()
        if not _fit(tensors) or opts.reduceOp != ReduceOp.SUM:
            return self.gloo.allreduce(tensors, opts)
        for part in _parts(tensors[0]):
            first, second, *more = self._exchange(part, self.others)
            np.add(first, second, out=part)
            for row in more:
                np.add(part, row, out=part)
        return Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Copy the tensor of one rank to the others; it goes on before they come, if its slot is free."""
        opts = opts or dist.BroadcastOptions()
        if not _fit(tensors):
            return self.gloo.broadcast(tensors, opts)
        root = opts.rootRank
        for part in _parts(tensors[0]):
            if self.me == root:
                self._exchange(part, [])
            else:
                part[:] = self._exchange(part, [root], lay=False)[root]
        return Done(tensors)

    def barrier(self, opts: Any = None) -> Done:
        """Wait for all."""
        self._exchange(NOTHING, self.others, lay=False)
        return Done([])

    def shutdown(self) -> None:
        """Leave; who waits for this rank gets an error."""
        self.have_left[self.me] = 1
        super().shutdown()

    def _exchange(self, part: np.ndarray, sources: list[int], lay: bool = True) -> list[np.ndarray]:
        """Take part in a round; return all slots, cut to the part's size, when those of the sources are filled.

        Args:
            part: what this rank lays down, if it does.
            sources: the ranks to read from.
            lay: whether it does.
        """
        self.round += 1
        rows = [slot[: len(part)] for slot in self.slots[part.dtype.type][self.round % 2]]
        if lay:
            for rank in self.others:  # they may still read what the slot held two rounds ago
                self._wait(rank, self.round - 1)
            rows[self.me][:] = part
        self.counters[self.me] = self.round
        for rank in sources:
            self._wait(rank, self.round)
        return rows

    def _wait(self, rank: int, number: int) -> None:
        """Wait until a rank's counter is at least this number.

        Raises:
            RuntimeError: if the rank is gone, or the time up.
        """
        counters = self.counters
        for _ in range(LOOKS):
            if counters[rank] >= number:
                return
        begin, next_check = time.monotonic(), CHECKING
        while counters[rank] < number:
            waited = time.monotonic() - begin
            time.sleep(min(waited / 10, LONGEST_SLEEP))
            if waited > next_check:
                next_check = waited + CHECKING
                self._check(rank, number, waited)

    def _check(self, rank: int, number: int, waited: float) -> None:
        """Raise an error if a rank is gone, or the time up."""
        member = self.members[rank]
        is_gone = self.have_left[rank] or _started(member.process_id) != member.started
        if self.counters[rank] >= number:  # it was the last that it did
            return
        if is_gone:
            raise RuntimeError(f"shared memory: Connection to rank {member.rank} lost")
        if waited > (self.timeout or self.gloo.options._timeout).total_seconds():
            raise RuntimeError(f"shared memory: Timed out waiting {waited * 1000:.0f} ms for rank {member.rank}")


def use_shared_memory(group: ProcessGroup | None = None) -> ProcessGroup:
    """Let the processes of a gloo group sum in shared memory if they can, and return their group; all of them call it.

    Where they cannot, on several hosts or another processor, and for a group that is not gloo's or that this process is
    not a member of, the group is returned as it is. Otherwise `torch.distributed` knows the returned group in its
    place, so call this before a `DistributedDataParallel` or something else has taken hold of the old one.

    Args:
        group: None for the group of all.
    """
    old = group or c10d._get_default_group()
    new = _share(old) if isinstance(old, ProcessGroup) and not isinstance(old, SharedMemoryGroup) else old
    if new is old:
        return old
    world, name = c10d._world, old.group_name
    books: list[dict[ProcessGroup, Any]] = [world.pg_map, world.pg_names, world.pg_group_ranks]
    for book in [*books, world.pg_backend_config, world.pg_to_tag]:
        book[new] = book.pop(old)
    for groups in world.tags_to_pg.values():
        groups[:] = [new if member is old else member for member in groups]
    c10d._unregister_process_group(name)
    c10d._register_process_group(name, new)
    new._set_group_name(name)
    new._set_group_desc(old.group_desc)
    if old is world.default_pg:
        c10d._update_default_pg(new)
    return new


def _create(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    """Form a group for `dist.new_group(ranks, backend="shared")`; where memory cannot be shared it is gloo's."""
    group = ProcessGroup(store, rank, size)
    gloo = c10d.ProcessGroupGloo(store, rank, size, timeout=timeout)
    gloo._set_sequence_number_for_group()
    for device in map(torch.device, DEVICES):
        group._register_backend(device, ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    return _share(group)


DEVICES = ["cpu", "cuda"]  # those of gloo
dist.Backend.register_backend("shared", _create, devices=DEVICES)


def _share(group: ProcessGroup) -> ProcessGroup:
    """Return what `use_shared_memory` does; all ranks decide alike, by messages through gloo."""
    cpu = torch.device("cpu")
    backend = group._get_backend(cpu) if cpu in group._device_types else None
    if not isinstance(backend, c10d.ProcessGroupGloo) or group.size() == 1:
        return group
    gloo: Any = backend
    descriptor, token = -1, secrets.randbits(62)
    if group.rank() == 0 and platform.machine() in PROCESSORS:
        with suppress(OSError, AttributeError):  # it is not Linux, or one that forbids it
            descriptor = os.memfd_create(_name(token))
            os.ftruncate(descriptor, group.size() * (8 * LINE + 2 * SLOT))
    rank = dist.get_rank() if dist.is_initialized() else group.rank()
    own = torch.tensor(Member(rank, os.getpid(), _started(os.getpid()), descriptor, token))
    rows = [torch.empty_like(own) for _ in range(group.size())]
    gloo.allgather([rows], [own]).wait()
    members = [Member(*row.tolist()) for row in rows]
    memory = _attach(members)
    all_see_it = _all(gloo, memory is not None)
    if descriptor >= 0:
        os.close(descriptor)
    if not all_see_it:
        return group
    shared = SharedMemoryGroup(group, members, cast("mmap.mmap", memory))
    difference = _difference(shared)
    if _all(gloo, not difference):
        return shared
    say_first("shared memory", f"going on with gloo: sums in shared memory are wrong {difference or 'on other ranks'}")
    return group


def _name(token: int) -> str:
    """Return the name of the memory in /proc; two names of one machine count as two hosts."""
    return f"sum-{token}-{socket.gethostname()}"


def _attach(members: list[Member]) -> mmap.mmap | None:
    """Return the memory that the first has made, None if it has not, or if not all are seen to run on this host.

    No file leads there, so nothing is left over however the processes end: /proc shows it while the first has it open.
    """
    first = members[0]
    path = f"/proc/{first.process_id}/fd/{first.descriptor}"
    try:
        if os.readlink(path) != f"/memfd:{_name(first.token)} (deleted)":
            return None
        if any(_started(member.process_id) != member.started for member in members):
            return None
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _difference(shared: SharedMemoryGroup) -> str:
    """Return by how much some sums differ from gloo's, empty if by rounding only, which two ranks do not leave."""
    generator = torch.Generator().manual_seed(shared.me)
    values = torch.randn(PROOF, generator=generator)
    expected = values.clone()
    shared.gloo.allreduce([expected]).wait()
    shared.timeout = PROOF_TIMEOUT
    try:
        for row in values:
            shared.allreduce([row])
    except RuntimeError as error:
        return f"({error})"
    finally:
        shared.timeout = None
    difference = (values - expected).abs().max().item()
    return "" if difference <= (TOLERANCE if len(shared.members) > 2 else 0) else f"by {difference:.1e}"


def _all(gloo: Any, opinion: bool) -> bool:
    """Whether all ranks say yes."""
    options = dist.AllreduceOptions()
    options.reduceOp = cast("ReduceOp", ReduceOp.MIN)
    agreed = torch.tensor(int(opinion))
    gloo.allreduce([agreed], options).wait()
    return bool(agreed)


def _fit(tensors: list[Tensor]) -> bool:
    """Whether shared memory carries these tensors."""
    tensor = tensors[0]
    return len(tensors) == 1 and tensor.is_cpu and tensor.dtype in KINDS and tensor.layout is torch.strided


def _parts(tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the numbers of a tensor, as many as a slot holds at a time; what is written there the tensor gets."""
    array = tensor.detach().numpy()
    flat = array.reshape(-1)
    step = SLOT // flat.itemsize
    for start in range(0, len(flat), step):
        yield flat[start : start + step]
    if not tensor.is_contiguous():  # else no copy was made
        array[...] = flat.reshape(array.shape)


def _started(process_id: int) -> int:
    """Return when a process started, in ticks of the machine's clock; 0 if it is gone."""
    try:
        state, *fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])
