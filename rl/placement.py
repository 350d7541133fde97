"""Where the processes run: on the CPU, or dealt out to the GPUs of their machine."""

from typing import Literal

import torch

from rl.launch import Ranks, fail, say


def place(cuda: bool, ranks: Ranks, processes_on_cpu: int = 0) -> tuple[torch.device, Literal["gloo", "nccl"]]:
    """Return the device of this process, and the backend for those that share its kind of device.

    NCCL wants a GPU for each process; where several share one, they talk through gloo.

    Args:
        cuda: whether GPUs are used at all.
        ranks: of this process.
        processes_on_cpu: the first so many of all ranks stay on the CPU all the same.

    Raises:
        SystemExit: if GPUs are wanted and none is visible.
    """
    if not cuda:
        return torch.device("cpu"), "gloo"
    if not (num_gpus := torch.cuda.device_count()):
        fail("--cuda needs a GPU, and PyTorch sees none: leave --cuda out to train on the CPU")
    first_rank_here = ranks.rank - ranks.local_rank
    on_cpu_here = max(0, processes_on_cpu - first_rank_here)
    on_gpu_here = ranks.local_world_size - on_cpu_here
    if on_gpu_here > num_gpus:
        say(f"{on_gpu_here} processes share {num_gpus} GPU{'s' * (num_gpus > 1)}: they talk through gloo, not NCCL")
    backend: Literal["gloo", "nccl"] = "gloo" if on_gpu_here > num_gpus else "nccl"
    if ranks.local_rank < on_cpu_here:
        return torch.device("cpu"), backend
    return torch.device("cuda", (ranks.local_rank - on_cpu_here) % num_gpus), backend
