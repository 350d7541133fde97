"""The gradient step as one compiled graph: what the scripts spell out takes some hundred operations of PyTorch.

On a small network the microseconds that PyTorch adds to each operation are most of what a step costs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.adam import adam

from rl.args import CommonArgs
from rl.launch import say
from rl.loss import ppo_loss
from rl.minibatch import Batch

GradientStep = Callable[[Batch, float], Tensor]

OPTIONS = {
    "cpp_wrapper": True,
    "cpp_cache_precompile_headers": False,  # to look for them costs a second, and there is little to compile
    "cpp.vec_isa_ok": True,  # what the processor can do is known; to try it would start a process that imports torch
    # Of all that a graph was compiled for, only the shapes of tensors change during a run, so only they are checked.
    "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
}

# Elements. Each weight begins at an address that is aligned as if it were alone: the last bit of a matrix product
# depends on that, and the player of the decoupled script, which compiles nothing, must act as a coupled script does.
ALIGNMENT = 16


def compile_gradient_step(
    plain: GradientStep,
    agent: nn.Module,
    optimizer: Optimizer,
    args: CommonArgs,
    example: Batch,
    sum_over_ranks: Callable[[Tensor], Tensor],
    world_size: int,
) -> GradientStep:
    """Return a compiled function that does what `plain` does, or `plain` itself if any rank cannot compile.

    On one process the forward pass, the backward pass, clipping and Adam are one graph. On several, two graphs stand
    around one message, in which the gradients of all weights are averaged over the ranks.

    From here on all weights lie in one tensor, and so does each part of Adam's state; what the agent and the optimizer
    hold are views of them.

    Args:
        plain: takes a minibatch and what `ppo_loss` calls `rows`, takes a gradient step, and returns what `Losses`
            holds, [6].
        agent: the plain one.
        optimizer: Adam of the agent's parameters; it must not load another state afterwards.
        args: of the run.
        example: a minibatch to compile for.
        sum_over_ranks: adds up a tensor over the ranks that optimize.
        world_size: the number of these ranks.
    """
    group, states = optimizer.param_groups[0], _adam_states(optimizer)
    beta1, beta2 = group["betas"]
    named = dict(agent.named_parameters())
    sizes = [parameter.numel() + -parameter.numel() % ALIGNMENT for parameter in named.values()]
    weights = _flatten(list(named.values()))
    exp_avg, exp_avg_sq, steps = (
        _flatten([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq", "step")
    )
    learning_rate = torch.zeros(1, dtype=torch.float64, device=weights.device)  # a scalar would be traced twice

    def loss(weights: Tensor, minibatch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(named.items(), weights.split(sizes), strict=True)
        views = {name: piece[: parameter.numel()].view_as(parameter) for (name, parameter), piece in pieces}
        losses = ppo_loss(lambda *inputs: functional_call(agent, views, inputs), minibatch, rows, args)
        return losses.loss, torch.stack(losses).detach()

    gradient = torch.func.grad(loss, has_aux=True)

    def descend(
        gradient: Tensor, weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, learning_rate: Tensor
    ) -> Tensor:
        norm = torch.linalg.vector_norm(gradient)
        clipped = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as `clip_grad_norm_` does
        step = steps[0].double()  # in float32 the bias correction of the first steps would be rounded away
        adam(
            *([weights], [clipped], [exp_avg], [exp_avg_sq], [], [step]),
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        steps += 1
        return norm

    def whole(minibatch: Batch, rows: Tensor, weights: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        gradients, losses = gradient(weights, minibatch, rows)
        return descend(gradients, weights, *state), losses

    compiled_gradient, compiled_descend, compiled_whole = (
        torch.compile(function, dynamic=False, fullgraph=True, options=OPTIONS)
        for function in (gradient, descend, whole)
    )

    @torch.no_grad()
    def take_step(
        minibatch: Batch, rows: float, average: Callable[[Tensor], Tensor], weights: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(rows, device=weights.device)
        if world_size == 1:
            return compiled_whole(minibatch, rows, weights, *state)
        gradients, losses = compiled_gradient(weights, minibatch, rows)
        return compiled_descend(average(gradients), weights, *state), losses

    def compiled(minibatch: Batch, rows: float) -> Tensor:
        learning_rate.fill_(group["lr"])
        norm, losses = take_step(minibatch, rows, lambda gradients: sum_over_ranks(gradients) / world_size, *state)
        if not math.isfinite(norm):
            raise RuntimeError("the norm of the gradient is non-finite")
        return losses

    say("compiling the gradient step (--no-compile starts at once and is slower)")
    state = (weights, exp_avg, exp_avg_sq, steps, learning_rate)
    failure = ""
    try:
        take_step(example, 1.0, lambda gradients: gradients, *(tensor.clone() for tensor in state))
    except Exception as error:  # a compiler fails in many ways
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if not sum_over_ranks(torch.tensor([bool(failure)], dtype=torch.float32, device=weights.device)):
        return compiled
    say(f"going on without compilation: {failure or 'another process cannot compile'}")
    return plain


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
