"""Stands in for gloo's all-reduce and barrier between two processes of one host: they add up in shared memory.

A message to a process of one's own host takes gloo some hundred microseconds, for 40 kB of gradients as for one byte.
"""

import mmap
import os
import platform
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Backend, ProcessGroup, ReduceOp, Store
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

from rl.voice import say_first

PROCESSORS = ("x86_64", "AMD64")  # each shows the others its stores in their order; elsewhere nothing promises that
TYPES = {torch.float32: np.float32, torch.float64: np.float64}
COLLECTIVES = (  # that gloo does
    *("broadcast", "reduce", "gather", "scatter", "send", "recv", "recv_anysource", "alltoall", "all_to_all_single"),
    *("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "allreduce_coalesced", "alltoall_base"),
)
SLOT = 2**23  # bytes that a rank can lay down; what is not used takes no memory
LINE = 16  # numbers of 8 bytes: what two processors write is never on one cache line, nor on neighbours

# A rank that waits does nothing but look at first, as the others are about to come. Then it leaves the core to others,
# whom it may be waiting for: it sleeps, for up to a tenth of its wait so far.
LOOKS = 2000
LONGEST_SLEEP = 0.0002  # seconds
CHECKING = 0.05  # seconds, until and between two checks that the other is alive and the time is not up

PROOF = (8, 10_000)  # rounds, and numbers in each


def use_shared_memory() -> None:
    """Make shared memory the backend of process groups on the CPU, which `choose_device` returns and Fabric chooses.

    Where memory cannot be shared (several hosts, another processor or system), and of more than two processes, such a
    group is gloo's.
    """
    if "shared" not in Backend.backend_list:
        Backend.register_backend("shared", _create_group, devices=["cpu"])
        Backend.default_device_backend_map["cpu"] = "shared"


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
    """A group of two processes that sums and waits in shared memory, at once, and leaves all else to gloo.

    In a round each rank lays its tensor into its slot, sets its counter to the number of the round, and reads that of
    the other once its counter has got there. A counter of n says that this rank has read all of round n - 1, so
    two slots in turn are enough. Both ranks add in the order of ranks, so they get the same, and what gloo gets.

    A wait ends with an error after the timeout of the gloo group, and soon after the process waited for has ended.

    Args:
        gloo: the same processes.
        memory: of zeros, the same for all.
    """

    def __init__(self, gloo: Any, memory: mmap.mmap) -> None:
        rank, size = gloo.rank(), gloo.size()
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self.gloo = ProcessGroup(dist.HashStore(), rank, size)
        self.gloo._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        self.gloo._set_default_backend(ProcessGroup.BackendType.GLOO)
        self.options, self.me, self.round = gloo.options, rank, 0
        self.other = 1 - rank
        numbers = memoryview(memory).cast("q")
        self.counters = numbers[: size * LINE : LINE]
        self.process_ids = numbers[1 : size * LINE : LINE]  # 0 of one that has left
        self.process_ids[rank] = os.getpid()
        slots = np.frombuffer(memory, np.uint8, offset=8 * LINE * size).reshape(2, size, SLOT)
        self.slots = {kind: [list(turn) for turn in slots.view(kind)] for kind in TYPES.values()}

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Sum over both ranks, or average, in place; what does not fit is gloo's."""
        opts = opts or dist.AllreduceOptions()
        tensor, is_mean = tensors[0], opts.reduceOp == ReduceOp.AVG
        if (
            not (is_mean or opts.reduceOp == ReduceOp.SUM)
            or len(tensors) > 1
            or tensor.dtype not in TYPES
            or tensor.nbytes > SLOT
        ):
            return self.gloo.allreduce(tensors, opts)
        values = tensor.detach().numpy()
        slots = self.slots[values.dtype.type][(self.round + 1) % 2]
        first, second = slots = [slot[: values.size].reshape(values.shape) for slot in slots]
        slots[self.me][...] = values
        self._meet()
        np.add(first, second, out=values)
        if is_mean:
            values /= 2
        return Done(tensors)

    def barrier(self, opts: Any = None) -> Done:
        """Wait for all."""
        self._meet()
        return Done([])

    def shutdown(self) -> None:
        """Leave; who waits for this rank gets an error."""
        self.process_ids[self.me] = 0
        super().shutdown()

    def _meet(self) -> None:
        """Begin a round, and wait until the other has."""
        self.round += 1
        self.counters[self.me] = self.round
        for _ in range(LOOKS):
            if self.counters[self.other] >= self.round:
                return
        self._wait()

    def _wait(self) -> None:
        """Wait until the other has begun the round.

        Raises:
            DistBackendError: if it is gone, or the time up.
        """
        begin, next_check = time.monotonic(), CHECKING
        while self.counters[self.other] < self.round:
            waited = time.monotonic() - begin
            time.sleep(min(waited / 10, LONGEST_SLEEP))
            if waited > next_check:
                next_check = waited + CHECKING
                is_gone = not _lives(self.process_ids[self.other])
                if is_gone and self.counters[self.other] < self.round:  # else that was its last act
                    raise dist.DistBackendError("shared memory: a process is gone")
                if waited > self.options._timeout.total_seconds():
                    raise dist.DistBackendError("shared memory: timed out")


def _leave_to_gloo(name: str) -> None:
    """Let a collective be gloo's own method.

    The one that is inherited holds the interpreter's lock while it calls gloo, whose threads may wait for that lock.
    """

    def collective(self: SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.gloo, name)(*args, **kwargs)

    setattr(SharedMemoryGroup, name, collective)


for name in COLLECTIVES:
    _leave_to_gloo(name)


def _create_group(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Form a group; all ranks decide alike whether in shared memory."""
    gloo: Any = c10d.ProcessGroupGloo(store, rank, size, timeout=timeout)
    if size != 2:  # gloo adds up more in an order of its own, and a run on two hosts is to equal that on one
        return gloo
    descriptor, name = -1, f"{uuid4().hex} {socket.gethostname()}"
    if rank == 0:
        if platform.machine() in PROCESSORS:
            with suppress(OSError, AttributeError):  # it is not Linux, or one that forbids it
                descriptor = os.memfd_create(name.partition(" ")[0])
                os.ftruncate(descriptor, size * (8 * LINE + 2 * SLOT))
        store.set("memory", f"{os.getpid()} {descriptor} {name}")
    memory = _attach(*store.get("memory").decode().split())
    group = SharedMemoryGroup(gloo, memory) if memory else None
    all_see_it = _all(gloo, group is not None)
    if descriptor >= 0:
        os.close(descriptor)
    if group is None or not all_see_it:
        return gloo
    difference = _difference(group)
    if _all(gloo, not difference):
        return group
    say_first("shared memory", f"going on with gloo: sums in shared memory are wrong {difference or 'on other ranks'}")
    return gloo


def _attach(process_id: str, descriptor: str, name: str, host: str) -> mmap.mmap | None:
    """Return the memory that rank 0 has made, None if it has not, or on another host.

    No file leads there, so nothing is left over however the processes end: /proc shows it while rank 0 has it open.
    """
    path = f"/proc/{process_id}/fd/{descriptor}"
    try:
        if host != socket.gethostname() or os.readlink(path) != f"/memfd:{name} (deleted)":
            return None
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError:
        return None


def _difference(group: SharedMemoryGroup) -> str:
    """Return by how much some sums differ from gloo's, empty if they are the same bit for bit."""
    values = torch.randn(PROOF, generator=torch.Generator().manual_seed(group.me))
    expected = values.clone()
    group.gloo.allreduce([expected]).wait()
    try:
        for row in values:
            group.allreduce([row])
    except dist.DistBackendError as error:
        return f"({error})"
    difference = (values - expected).abs().max().item()
    return f"by {difference:.1e}" if difference else ""


def _all(gloo: Any, opinion: bool) -> bool:
    """Whether all ranks say yes."""
    options = dist.AllreduceOptions()
    options.reduceOp = cast("ReduceOp", ReduceOp.MIN)
    agreed = torch.tensor(int(opinion))
    gloo.allreduce([agreed], options).wait()
    return bool(agreed)


def _lives(process_id: int) -> bool:
    """Whether a process of this host has not ended."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
