"""A guard that stays on: all processes must hold the same weights."""

import torch
from torch import Tensor, nn

from rl.voice import RunError


def weights_checksum(agent: nn.Module) -> Tensor:
    """Return a number that changes with any bit of the weights and with their order, int64 [1]."""
    bits = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]).view(torch.int32).long()
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum(0, keepdim=True)


def check_agreement(checksums: Tensor, update: int) -> None:
    """End the run if the checksums of the ranks differ: their gradients or their data went apart.

    Args:
        checksums: one of each rank, int64 [W] or [W, 1].
        update: number of updates done.

    Raises:
        RunError: if they differ.
    """
    if len(checksums.unique()) > 1:
        raise RunError(
            f"after update {update} the ranks hold different weights, checksums {checksums.flatten().tolist()}"
        )
