"""Where the processes run: on which cores, and on the CPU or dealt out to the GPUs of their machine."""

import os

import torch
import torch.distributed as dist
from torch.distributed import Backend, PrefixStore

from rl.processes.ranks import read_ranks
from rl.voice import RunError, say


def choose_device(cuda: bool, apart: int = 0, apart_on_gpu: bool = False) -> tuple[torch.device, str]:
    """Return the device of this process, and the backend for those that share its kind of device.

    On the CPU that is PyTorch's default, which `use_shared_memory` changes. NCCL wants a GPU for each process; where
    several share one, on any machine, or there is only one process, all talk through gloo.

    Args:
        cuda: whether GPUs are used at all.
        apart: the first so many of all ranks are in no group with the others. They take the GPUs after those of the
            others on their machine, and share them where none is left.
        apart_on_gpu: whether they compute on a GPU; else they stay on the CPU.

    Raises:
        RunError: if this process wants a GPU and none is visible.
    """
    ranks = read_ranks()
    if not cuda:
        return torch.device("cpu"), Backend.default_device_backend_map["cpu"]
    apart_here = max(0, apart - (ranks.rank - ranks.local_rank))
    members_here = max(0, ranks.local_world_size - apart_here)
    is_apart = ranks.local_rank < apart_here
    gpu = torch.accelerator.current_accelerator()  # "cuda", unless PyTorch was made for others
    kind, num_gpus = (gpu.type, torch.accelerator.device_count()) if gpu else ("cuda", 0)
    if not num_gpus and not (is_apart and not apart_on_gpu):
        raise RunError("--cuda needs a GPU, and PyTorch sees none: leave --cuda out to train on the CPU")
    shares = members_here > num_gpus
    if shares:
        say(f"{members_here} processes share {num_gpus} GPU{'s' * (num_gpus > 1)}: they talk through gloo, not NCCL")
    if not apart and ranks.world_size > ranks.local_world_size:  # where some are apart, the `Channel` asks
        shares = _holds_anywhere(shares, ranks.world_size)
    backend = "gloo" if shares or ranks.world_size == 1 else Backend.default_device_backend_map[kind]
    if is_apart and not apart_on_gpu:
        return torch.device("cpu"), backend
    place = members_here + ranks.local_rank if is_apart else ranks.local_rank - apart_here
    torch.accelerator.set_device_index(place % num_gpus)
    return torch.device(kind, place % num_gpus), backend


def _holds_anywhere(holds: bool, world_size: int) -> bool:
    """Return whether something holds on any rank; they hear it through the store by which they will meet."""
    store, _, _ = next(dist.rendezvous("env://"))
    store = PrefixStore("holds", store)
    store.add("ranks", int(holds))
    if store.add("told", 1) == world_size:
        store.set("all", "")
    store.wait(["all"])
    return store.add("ranks", 0) > 0


def keep_to_own_cores() -> None:
    """Let each process of this machine compute on cores of its own (Linux; elsewhere the system decides).

    Processes that wait for each other after every few hundred microseconds are often put on the same core when they
    wake, and then take turns. Call it once all process groups are made: the threads that they began, which carry the
    messages, are to run wherever there is room.
    """
    ranks = read_ranks()
    if ranks.local_world_size == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks.local_world_size
    first = ranks.local_rank * share if share else ranks.local_rank % len(cores)
    os.sched_setaffinity(0, cores[first : first + max(share, 1)])


def compute_in_float32() -> None:
    """Let GPUs convolve in float32 and alike in each run; cuDNN would round to TF32, and choose by the clock."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
