"""Where the processes run: on which cores, and on the CPU or dealt out to the GPUs of their machine."""

import os

import torch
from torch.distributed import Backend

from rl.processes.ranks import read_ranks
from rl.voice import RunError, say


def choose_device(cuda: bool, processes_on_cpu: int = 0) -> tuple[torch.device, str]:
    """Return the device of this process, and the backend for those that share its kind of device.

    On the CPU that is PyTorch's default, which `use_shared_memory` changes. NCCL wants a GPU for each process; where
    several share one, they talk through gloo.

    Args:
        cuda: whether GPUs are used at all.
        processes_on_cpu: the first so many of all ranks stay on the CPU all the same.

    Raises:
        RunError: if GPUs are wanted and none is visible.
    """
    ranks = read_ranks()
    if not cuda:
        return torch.device("cpu"), Backend.default_device_backend_map["cpu"]
    gpu = torch.accelerator.current_accelerator()  # "cuda", unless PyTorch was made for others
    if gpu is None or not (num_gpus := torch.accelerator.device_count()):
        raise RunError("--cuda needs a GPU, and PyTorch sees none: leave --cuda out to train on the CPU")
    first_rank_here = ranks.rank - ranks.local_rank
    on_cpu_here = max(0, processes_on_cpu - first_rank_here)
    on_gpu_here = ranks.local_world_size - on_cpu_here
    if on_gpu_here > num_gpus:
        say(f"{on_gpu_here} processes share {num_gpus} GPU{'s' * (num_gpus > 1)}: they talk through gloo, not NCCL")
    backend = "gloo" if on_gpu_here > num_gpus else Backend.default_device_backend_map[gpu.type]
    if ranks.local_rank < on_cpu_here:
        return torch.device("cpu"), backend
    return torch.device(gpu.type, (ranks.local_rank - on_cpu_here) % num_gpus), backend


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
