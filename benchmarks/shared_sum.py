"""How long two processes of this machine take for a sum: with gloo, in shared memory, and as Fabric does it.

Usage: python -m benchmarks.shared_sum
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import multiprocessing

from rl.fast.shared_memory import use_shared_memory

NUMBERS = (10_000, 1_700_000)  # of the gradients of a small network, and of one that sees images
WORK = 150e-6  # seconds, of a small forward and backward pass
REPETITIONS, ROUNDS = 7, 300


def measure(rank: int, world_size: int, folder: str) -> None:
    """Print the times, as rank 0 sees them."""
    torch.set_num_threads(1)
    if rank < (os.cpu_count() or 1):
        os.sched_setaffinity(0, [rank])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    use_shared_memory()
    for backend in ("gloo", "shared"):
        group = dist.new_group(backend=backend)
        for numbers in NUMBERS:
            tensor = torch.zeros(numbers)
            rounds = max(10, ROUNDS * NUMBERS[0] // numbers)
            for work in (0, WORK):
                for kind, step in (("all_reduce", sum_up), ("barrier and all_reduce", sum_up_as_fabric)):
                    microseconds = time_of(partial(step, group=group), tensor, work, rounds)
                    if rank == 0:
                        after = f"after {work * 1e6:.0f} µs of work" if work else "back to back"
                        what = f"{backend:6}  {numbers:9,} floats  {kind:22}  {after:20}"
                        print(f"{what} {microseconds:8.1f} µs", flush=True)
    dist.destroy_process_group()


def sum_up(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """What `DistributedDataParallel` and a raw script do."""
    dist.all_reduce(tensor, group=group)


def sum_up_as_fabric(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """What `fabric.all_reduce` does."""
    dist.barrier(group)
    dist.all_reduce(tensor, group=group)


def time_of(step: Callable[[torch.Tensor], None], tensor: torch.Tensor, work: float, rounds: int) -> float:
    """Return the microseconds of a step, without the work before it: the median of repetitions."""
    times = []
    for _ in range(1 + REPETITIONS):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(rounds):
            end_of_work = time.perf_counter() + work
            while time.perf_counter() < end_of_work:
                pass
            step(tensor)
        times.append((time.perf_counter() - begin) / rounds - work)
    return 1e6 * median(times[1:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (2, folder), nprocs=2)
