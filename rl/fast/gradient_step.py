"""Stands in for `gradient_step` of the scripts: one compiled graph for some hundred operations of PyTorch.

On a small network the microseconds that PyTorch adds to each operation are most of what a step costs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.adam import adam

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss
from rl.ppo.minibatches import minibatch_sizes
from rl.voice import say_first


class GradientStep(Protocol):
    """Takes a minibatch and the average number of its rows over the ranks, and returns what `Losses` holds, [6]."""

    def __call__(self, minibatch: Batch, mean_rows: float) -> Tensor: ...  # noqa: D102


PROVE_EVERY = 1000  # steps; a proof takes a few milliseconds

OPTIONS: dict[str, Any] = {
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
    shown: GradientStep,
    agent: Agent,
    optimizer: Optimizer,
    args: CommonArgs,
    num_rows: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    world_size: int,
) -> GradientStep:
    """Return what stands in for `shown`, the gradient step of a script, as long as it does the same (`ProvenStep`).

    On one process the forward pass, the backward pass, clipping and Adam are one graph. On several, two graphs stand
    around one message, in which the gradients of all weights are averaged over the ranks.

    From here on all weights lie in one tensor, and so does each part of Adam's state; what the agent and the optimizer
    hold are views of them.

    Args:
        shown: takes a minibatch and what `ppo_loss` calls `mean_rows`, takes a gradient step, and returns what `Losses`
            holds, [6].
        agent: the plain one.
        optimizer: of the agent's parameters; it must not load another state afterwards.
        args: of the run.
        num_rows: rows of an update, over all ranks that optimize.
        sum_over_ranks: adds up a tensor over the ranks that optimize.
        world_size: the number of these ranks.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without what Fabric wraps around it
    group, *others = optimizer.param_groups
    if type(optimizer) is not torch.optim.Adam or others or group["amsgrad"] or group["maximize"]:
        say_first(
            "compiling", f"going on without compilation, which knows only plain Adam, not {_in_one_line(optimizer)}"
        )
        return shown
    states = _adam_states(optimizer)
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
        mean_rows = torch.tensor(rows, device=weights.device)
        if world_size == 1:
            return compiled_whole(minibatch, mean_rows, weights, *state)
        gradients, losses = compiled_gradient(weights, minibatch, mean_rows)
        return compiled_descend(average(gradients), weights, *state), losses

    def compiled(minibatch: Batch, mean_rows: float) -> Tensor:
        learning_rate.fill_(group["lr"])
        norm, losses = take_step(minibatch, mean_rows, lambda gradients: sum_over_ranks(gradients) / world_size, *state)
        if not math.isfinite(norm):
            raise RuntimeError("the norm of the gradient is non-finite")
        return losses

    say_first("compiling", "compiling the gradient step (--no-compile starts at once and is slower)")
    state = (weights, exp_avg, exp_avg_sq, steps, learning_rate)
    failure = ""
    try:
        for size in sorted({size for ranks in minibatch_sizes(num_rows, args, world_size) for size in ranks}):
            take_step(Batch.zeros(size, agent), 1.0, lambda gradients: gradients, *(tensor.clone() for tensor in state))
    except Exception as error:  # a compiler fails in many ways
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return ProvenStep(shown, compiled, failure, AdamState(*state[:4]), group, list(named), sizes, sum_over_ranks)


class AdamState(NamedTuple):
    """The weights and their Adam's state, each in one tensor [P]."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class ProvenStep:
    """A gradient step in a fast way that proves itself against the shown way.

    Its first step, and every thousandth after (an edit may change the loss as training goes on), is taken in both ways,
    from the same state and on the run's own minibatch. Where weights, moments or losses differ by more than rounding,
    on any rank, a line says so, and the shown way alone goes on from what it did.

    Args:
        shown: the step of the script.
        fast: what is to stand in for it.
        failure: why `fast` cannot be called on this process, if so.
        state: what both change.
        group: the settings of Adam.
        names: of the parameters.
        sizes: elements of each parameter in the tensors of `state`.
        sum_over_ranks: adds up a tensor over the ranks that optimize.
    """

    def __init__(
        self,
        shown: GradientStep,
        fast: GradientStep,
        failure: str,
        state: AdamState,
        group: dict[str, Any],
        names: list[str],
        sizes: list[int],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.shown, self.fast, self.failure = shown, fast, failure
        self.state, self.group, self.names, self.sizes = state, group, names, sizes
        self.sum_over_ranks = sum_over_ranks
        self.steps = 0
        self.is_proven = True

    def __call__(self, minibatch: Batch, mean_rows: float) -> Tensor:
        """Take a gradient step, see `GradientStep`."""
        if self.is_proven and self.steps % PROVE_EVERY == 0:
            return self._prove(minibatch, mean_rows)
        self.steps += 1
        return (self.fast if self.is_proven else self.shown)(minibatch, mean_rows)

    def _prove(self, minibatch: Batch, rows: float) -> Tensor:
        """Take a step in both ways, and leave behind what the fast one did, or if they differ the shown one."""
        if self.steps == 0 and self._on_any_rank(bool(self.failure)):
            self._step_aside(self.failure or "another process cannot compile")
            return self.shown(minibatch, rows)
        self.steps += 1
        before = AdamState(*(tensor.clone() for tensor in self.state))
        difference, shown, fast = self._compare(before, minibatch, rows)
        # A row may lie where the loss has an edge: rounding then decides on its gradient. It is in one half only.
        if difference and not all(self._compare(before, half, rows)[0] for half in _halves(minibatch)):
            difference = ""
        if difference:
            self._step_aside(f"the compiled gradient step is not the one of the script, {difference}")
        losses, state = shown if difference else fast
        self._set(state)
        return losses

    def _compare(
        self, before: AdamState, minibatch: Batch, rows: float
    ) -> tuple[str, tuple[Tensor, AdamState], tuple[Tensor, AdamState]]:
        """Take a step in both ways; return in what they differ, on any rank, and what each led to."""
        outcomes: list[tuple[Tensor, AdamState]] = []
        for step in (self.shown, self.fast):
            self._set(before)
            losses = step(minibatch, rows)
            outcomes.append((losses, AdamState(*(tensor.clone() for tensor in self.state))))
        difference = self._difference(before, *outcomes)
        if self._on_any_rank(bool(difference)):
            difference = difference or "as another process found"
        return difference, outcomes[0], outcomes[1]

    def _difference(self, before: AdamState, shown: tuple[Tensor, AdamState], fast: tuple[Tensor, AdamState]) -> str:
        """Return in what the two ways differ by more than rounding, empty if in nothing."""
        (shown_losses, ours), (fast_losses, theirs) = shown, fast
        if not torch.allclose(shown_losses, fast_losses, rtol=1e-3, atol=1e-4):
            return "its losses differ"
        if not torch.equal(ours.steps[::ALIGNMENT], theirs.steps[::ALIGNMENT]):  # between them is padding
            return "Adam counts other steps"
        beta1, beta2 = self.group["betas"]
        gradient = ours.exp_avg - beta1 * before.exp_avg
        squares = ours.exp_avg_sq - beta2 * before.exp_avg_sq
        # The weights to which Adam goes with the moments that the script's step left (Kingma & Ba 2015, algorithm 1).
        step = ours.steps[0].double()
        mean, variance = ours.exp_avg / (1 - beta1**step), ours.exp_avg_sq / (1 - beta2**step)
        change = self.group["lr"] * mean / (variance.sqrt() + self.group["eps"])
        checks = (
            ("the gradient", ours.exp_avg, theirs.exp_avg, gradient, 1e-4, 1e-6 * ours.exp_avg.norm()),
            ("the squared gradient", ours.exp_avg_sq, theirs.exp_avg_sq, squares, 1e-3, 1e-6 * ours.exp_avg_sq.norm()),
            ("what follows Adam", ours.weights, before.weights - change, change, 1e-5, 2e-7 * ours.weights.norm()),
            ("the weights", ours.weights, theirs.weights, change, 1e-2, 2e-7 * ours.weights.norm()),
        )
        for what, one, other, scale, relative, absolute in checks:
            floor = relative * 1e-2 * scale.norm() + absolute
            pieces = zip(self.names, (one - other).split(self.sizes), scale.split(self.sizes), strict=True)
            for name, error, size in pieces:
                if not error.norm() <= relative * size.norm() + floor:
                    return f"{what} of {name} differs"
        return ""

    def _step_aside(self, reason: str) -> None:
        self.is_proven = False
        say_first("compiled", f"going on without compilation: {reason}")

    def _on_any_rank(self, holds: bool) -> bool:
        flag = torch.tensor([holds], dtype=torch.float32, device=self.state.weights.device)
        return bool(self.sum_over_ranks(flag))

    def _set(self, values: AdamState) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.state, values, strict=True):
                tensor.copy_(value)


def _halves(minibatch: Batch) -> list[Batch]:
    """Return the first half of the rows twice, and the second half twice: minibatches of the same size."""
    rows = torch.arange(minibatch.num_rows, device=minibatch.actions.device)
    first = rows % -(-len(rows) // 2)
    return [Batch(*(field[half] for field in minibatch)) for half in (first, len(rows) - 1 - first)]


def _in_one_line(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__name__} with {len(optimizer.param_groups)} groups of parameters"


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
