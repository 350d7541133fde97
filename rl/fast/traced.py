"""The gradient step as a graph that `torch.compile` makes of the agent and of the loss."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim.adam import adam

from rl.args import CommonArgs
from rl.fast.flat import FastStep, FlatAdam
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss

# Of all that a graph was compiled for, only the shapes of tensors change during a run, so only they are checked.
OPTIONS: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
ON_CPU = OPTIONS | {
    "cpp_wrapper": True,
    "cpp_cache_precompile_headers": False,  # to look for them costs a second, and there is little to compile
    "cpp.vec_isa_ok": True,  # what the processor can do is known; to try it would start a process that imports torch
}
ON_GPU = OPTIONS | {"triton.cudagraphs": True}  # all kernels of a step in one launch; a wrapper in C++ wants a toolkit


def make_traced_step(
    agent: Agent,
    args: CommonArgs,
    flat: FlatAdam,
    sizes: list[int],
    average: Callable[[Tensor], Tensor] | None,
) -> FastStep:
    """Return a function that takes a gradient step and returns the norm of the gradient and what `Losses` holds, [6].

    On one process the forward pass, the backward pass, clipping and Adam are one graph. On several, two graphs stand
    around one message, in which the gradients of all weights are averaged over the ranks.

    Args:
        agent: the plain one.
        args: of the run.
        flat: the weights and their Adam.
        sizes: of the minibatches that will come, to compile for.
        average: averages the gradient over the ranks, if there are several.
    """
    group = flat.group
    beta1, beta2 = group["betas"]
    device = flat.state.weights.device
    learning_rate = torch.zeros(1, dtype=torch.float64, device=device)  # a scalar is traced twice
    divisor = torch.zeros((), device=device)
    for tensor in (*flat.state, learning_rate, divisor) if device.type != "cpu" else ():
        torch._dynamo.mark_static_address(tensor)  # a CUDA graph reads and writes them in their place

    def loss(weights: Tensor, minibatch: Batch, mean_rows: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(flat.named.items(), weights.split(flat.sizes), strict=True)
        views = {name: piece[: parameter.numel()].view_as(parameter) for (name, parameter), piece in pieces}
        losses = ppo_loss(
            lambda *inputs: functional_call(agent, views, inputs), minibatch, cast("float", mean_rows), args
        )
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
            capturable=device.type != "cpu",  # so that no number is read from the GPU
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

    def whole(minibatch: Batch, mean_rows: Tensor, weights: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        gradients, losses = gradient(weights, minibatch, mean_rows)
        return descend(gradients, weights, *state), losses

    compiled_gradient, compiled_descend, compiled_whole = (
        torch.compile(function, dynamic=False, fullgraph=True, options=ON_CPU if device.type == "cpu" else ON_GPU)
        for function in (gradient, descend, whole)
    )

    @torch.no_grad()
    def step(
        minibatch: Batch, mean_rows: float, average: Callable[[Tensor], Tensor] | None = average
    ) -> tuple[Tensor, Tensor]:
        learning_rate.fill_(group["lr"])
        divisor.fill_(mean_rows)
        if average is None:
            return compiled_whole(minibatch, divisor, *flat.state, learning_rate)
        gradients, losses = compiled_gradient(flat.state.weights, minibatch, divisor)
        return compiled_descend(average(gradients), *flat.state, learning_rate), losses

    # Compile now, for the minibatches that will come.
    before = [tensor.clone() for tensor in flat.state]
    for size in sizes:
        step(Batch.zeros(size, agent), 1.0, average and (lambda gradients: gradients))  # no other process is here yet
    with torch.no_grad():
        for tensor, value in zip(flat.state, before, strict=True):
            tensor.copy_(value)
    return step
