"""Bytes between processes: where messages may lie, and how the first process gathers what it writes for all."""

import torch
import torch.distributed as dist
from torch import Tensor


def message_device() -> torch.device:
    """Return the device from which the processes send to each other: with NCCL their GPU, else the CPU."""
    gpu = torch.accelerator.current_accelerator()  # that is, the current one of its kind, which each process has chosen
    return gpu if gpu and dist.get_backend() == "nccl" else torch.device("cpu")


def gather_bytes(packed: Tensor) -> list[Tensor]:
    """Return the bytes of all processes on rank 0, uint8 [bytes] each, in the order of ranks, and nothing elsewhere.

    They differ in number, so the number travels first. Call it on all processes.

    Args:
        packed: those of this process, uint8 [bytes], on the CPU.
    """
    packed = packed.to(message_device())
    size = torch.tensor([len(packed)], device=packed.device)
    if dist.get_rank() > 0:
        dist.send(size, 0)
        dist.send(packed, 0)
        return []
    gathered = [packed.cpu()]
    for rank in range(1, dist.get_world_size()):
        dist.recv(size, rank)
        received = packed.new_empty(int(size))
        dist.recv(received, rank)
        gathered.append(received.cpu())
    return gathered
