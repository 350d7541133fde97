"""The weights of an agent and the state of its Adam, each in one tensor."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rl.ppo.agent import Agent
from rl.ppo.batch import Batch

# Takes a gradient step and returns the norm of the gradient and what `Losses` holds, [6].
FastStep = Callable[[Batch, float], tuple[Any, Tensor]]

# Elements. Each weight begins at an address that is aligned as if it were alone: the last bit of a matrix product
# depends on that, and the player of the decoupled script, which compiles nothing, must act as a coupled script does.
ALIGNMENT = 16


class AdamState(NamedTuple):
    """The weights and their Adam's state, each in one tensor [P]."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class FlatAdam(NamedTuple):
    """The parameters of an agent and their Adam, of which all that changes lies in `state`."""

    state: AdamState
    group: dict[str, Any]  # the settings of Adam
    named: dict[str, nn.Parameter]  # views of `state.weights`, one after the other
    sizes: list[int]  # elements of each one in `state.weights`, padding included

    @classmethod
    def of(cls, agent: Agent, optimizer: Optimizer) -> "FlatAdam":
        """Move all weights into one tensor, and so each part of Adam's state.

        What the agent and the optimizer hold are views of them from then on.
        """
        (group,) = optimizer.param_groups
        states = _adam_states(optimizer)
        named = dict(agent.named_parameters())
        sizes = [parameter.numel() + -parameter.numel() % ALIGNMENT for parameter in named.values()]
        moments = (_flatten([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq", "step"))
        return cls(AdamState(_flatten(list(named.values())), *moments), group, named, sizes)


def rounded_otherwise(weights: Tensor) -> Iterator[Tensor]:
    """Yield the weights four times [P], each moved by its rounding, up or down at random.

    Together, what is computed from them moves as far as rounding may: a single draw seldom shows the most (Vignes 1993,
    "A stochastic arithmetic for reliable scientific computation").
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        signs = 2 * torch.randint(2, weights.shape, generator=generator).to(weights) - 1
        yield weights * (1 + torch.finfo(weights.dtype).eps * signs)


def _adam_states(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Return the states of the parameters, zeros where Adam has not taken a step."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        if not optimizer.state[parameter]:
            zeros = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return [optimizer.state[parameter] for parameter in group["params"]]


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Return all tensors in one, padded with zeros, and let them be views of it from now on."""
    padded = [nn.functional.pad(tensor.detach().flatten(), (0, -tensor.numel() % ALIGNMENT)) for tensor in tensors]
    flat = torch.cat(padded)
    for tensor, piece in zip(tensors, flat.split([len(piece) for piece in padded]), strict=True):
        tensor.data = piece[: tensor.numel()].view_as(tensor)
    return flat
