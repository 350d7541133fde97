"""A guard that stays on: all processes must hold the same weights."""

import torch
from torch import Tensor, nn

from rl.voice import RunError


def weights_checksum(agent: nn.Module) -> Tensor:
    """Return numbers that change with any bit of the weights and with their order, and their squares, float64 [2, 4].

    The numbers have 16 bits each, so that sums of the squares over many ranks are exact.
    """
    bits = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]).view(torch.int32).long()
    whole = (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
    numbers = torch.stack([(whole >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]).double()
    return torch.stack([numbers, numbers.square()])


def check_agreement(sums: Tensor, world_size: int, update: int) -> None:
    """End the run if the ranks hold different weights: their gradients or their data went apart.

    The W numbers n of the ranks are the same if and only if their variance is zero: W Σ n² = (Σ n)².

    Args:
        sums: of what `weights_checksum` returns, over all ranks, [2, 4].
        world_size: W.
        update: number of updates done.

    Raises:
        RunError: if they differ.
    """
    numbers, squares = sums
    if not torch.equal(world_size * squares, numbers.square()):
        raise RunError(f"after update {update} the ranks hold different weights")
