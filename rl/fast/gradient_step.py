"""Stands in for `gradient_step` of the scripts, faster: in C++ or as one graph for some hundred operations of PyTorch.

On a small network the microseconds that PyTorch adds to each operation are most of what a step costs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rl.args import STEPS_FOR_TORCH, CommonArgs
from rl.fast.flat import ALIGNMENT, AdamState, FastStep, FlatAdam, rounded_otherwise
from rl.fast.native import make_native_step
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.minibatches import minibatch_sizes
from rl.voice import say_first


class GradientStep(Protocol):
    """Takes a minibatch and the average number of its rows over the ranks, and returns what `Losses` holds, [6]."""

    def __call__(self, minibatch: Batch, mean_rows: float) -> Tensor: ...  # noqa: D102


Outcome = tuple[Tensor, AdamState]  # the losses of a step, and the state to which it led

CPP, GRAPH, NONE = "C++", "graph", "none"  # ways to take a step faster
PROVE_EVERY = 1000  # steps; a proof takes a few milliseconds


def compile_gradient_step(
    shown: GradientStep,
    agent: Agent,
    optimizer: Optimizer,
    args: CommonArgs,
    num_rows: int,
    process_group: Any = None,
) -> GradientStep:
    """Return what stands in for `shown`, the gradient step of a script, as long as it does the same (`ProvenStep`).

    That is `shown` itself in a run of fewer gradient steps than win back the seconds of compiling, unless `--compile`
    says otherwise. Else it is C++ (`native`) for perceptrons with the loss of `ppo_loss`, and for all others what
    `torch.compile` makes of the agent and the loss (`traced`). From here on all weights lie in one tensor, and so does
    each part of Adam's state (`FlatAdam`).

    Args:
        shown: takes a minibatch and what `ppo_loss` calls `mean_rows`, takes a gradient step, and returns what `Losses`
            holds, [6].
        agent: the plain one.
        optimizer: of the agent's parameters; it must not load another state afterwards.
        args: of the run.
        num_rows: rows of an update, over all ranks that optimize.
        process_group: these ranks; without it all.
    """
    world_size = dist.get_world_size(process_group) if dist.is_initialized() else 1
    if not args.compiles(num_rows, world_size):
        return shown
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without what Fabric wraps around it
    group, *others = optimizer.param_groups
    if type(optimizer) is not torch.optim.Adam or others or group["amsgrad"] or group["maximize"]:
        say_first(
            "compiling", f"going on without compilation, which knows only plain Adam, not {_in_one_line(optimizer)}"
        )
        return shown
    say_first("compiling", "compiling the gradient step (--no-compile starts at once and is slower)")
    flat = FlatAdam.of(agent, optimizer)

    def sum_over_ranks(tensor: Tensor) -> Tensor:
        if world_size > 1:
            dist.all_reduce(tensor, group=process_group)
        return tensor

    average = (lambda gradient: sum_over_ranks(gradient) / world_size) if world_size > 1 else None

    def is_on_any_rank(holds: bool) -> bool:
        return bool(sum_over_ranks(torch.tensor([holds], dtype=torch.float32, device=flat.state.weights.device)))

    # Nothing here waits for another process: one that repeats long episodes may come much later.
    way, failure = CPP, ""
    take_step: FastStep | None = make_native_step(agent, args, flat, average)
    if take_step is None:
        way = NONE
        if args.compile or args.gradient_steps(num_rows, world_size) >= STEPS_FOR_TORCH:
            from rl.fast.traced import make_traced_step  # here: only where it is needed is its compiler imported

            sizes = sorted({size for ranks in minibatch_sizes(num_rows, args, world_size) for size in ranks})
            try:
                way, take_step = GRAPH, make_traced_step(agent, args, flat, sizes, average)
            except Exception as error:  # a compiler fails in many ways
                way, failure = NONE, f"{type(error).__name__}: {error}".splitlines()[0]

    def fast(minibatch: Batch, mean_rows: float) -> Tensor:
        assert take_step is not None  # nobody calls this where the way is NONE
        norm, losses = take_step(minibatch, mean_rows)
        if isinstance(norm, Tensor) and norm.device.type != "cpu":
            return losses + 0 * norm  # to read the norm would wait for the GPU; `Run.means` finds the NaN in the losses
        if not math.isfinite(norm):
            raise RuntimeError("the norm of the gradient is non-finite")
        return losses

    return ProvenStep(shown, fast, way, failure, flat.state, group, list(flat.named), flat.sizes, is_on_any_rank)


class ProvenStep:
    """A gradient step in a fast way that proves itself against the shown way.

    Its first step, and every thousandth after (an edit may change the loss as training goes on), is taken in both ways,
    from the same state and on the run's own minibatch. Where weights, moments or losses differ by more than rounding,
    on any rank, a line says so, and the shown way alone goes on from what it did.

    Args:
        shown: the step of the script.
        fast: what is to stand in for it.
        way: CPP or GRAPH, or NONE if `fast` cannot be called on this process.
        failure: why it cannot, if that is to be said.
        state: what both change.
        group: the settings of Adam.
        names: of the parameters.
        sizes: elements of each parameter in the tensors of `state`.
        is_on_any_rank: whether something holds on any of the ranks that optimize.
    """

    def __init__(
        self,
        shown: GradientStep,
        fast: GradientStep,
        way: str,
        failure: str,
        state: AdamState,
        group: dict[str, Any],
        names: list[str],
        sizes: list[int],
        is_on_any_rank: Callable[[bool], bool],
    ) -> None:
        self.shown, self.fast, self.way, self.failure = shown, fast, way, failure
        self.state, self.group, self.names, self.sizes = state, group, names, sizes
        self.is_on_any_rank = is_on_any_rank
        self.steps = 0
        self.is_proven = True

    def __call__(self, minibatch: Batch, mean_rows: float) -> Tensor:
        """Take a gradient step, see `GradientStep`."""
        if self.is_proven and self.steps % PROVE_EVERY == 0:
            return self._prove(minibatch, mean_rows)
        self.steps += 1
        return (self.fast if self.is_proven else self.shown)(minibatch, mean_rows)

    def _prove(self, minibatch: Batch, mean_rows: float) -> Tensor:
        """Take a step in both ways, and leave behind what the fast one did, or if they differ the shown one."""
        if self.steps == 0:
            ways = [way for way in (CPP, GRAPH, NONE) if self.is_on_any_rank(way == self.way)]
            if ways not in ([CPP], [GRAPH]):  # each way rounds in its own manner
                self._step_aside(self.failure or ("another process compiles otherwise" if len(ways) > 1 else ""))
                return self.shown(minibatch, mean_rows)
        self.steps += 1
        before = AdamState(*(tensor.clone() for tensor in self.state))
        difference, shown, fast = self._compare(before, minibatch, mean_rows)
        # A row may lie where the loss has an edge: rounding then decides on its gradient. It is in one half only.
        if difference and not all(self._compare(before, half, mean_rows)[0] for half in _halves(minibatch)):
            difference = ""
        # Or all rows are ill-conditioned, as where the errors of large values cancel out.
        if difference and self._is_rounding(before, minibatch, mean_rows, shown, fast):
            difference = ""
        if difference:
            self._step_aside(f"the compiled gradient step is not the one of the script, {difference}")
        losses, state = shown if difference else fast
        self._set(state)
        return losses

    def _compare(self, before: AdamState, minibatch: Batch, mean_rows: float) -> tuple[str, Outcome, Outcome]:
        """Take a step in both ways; return in what they differ, on any rank, and what each led to."""
        shown, fast = (self._take(step, before, minibatch, mean_rows) for step in (self.shown, self.fast))
        difference = self._difference(before, shown, fast)
        if self.is_on_any_rank(bool(difference)):
            difference = difference or "as another process found"
        return difference, shown, fast

    def _is_rounding(
        self, before: AdamState, minibatch: Batch, mean_rows: float, shown: Outcome, fast: Outcome
    ) -> bool:
        """Return whether the ways differ no more than the shown one from itself, if the weights are rounded otherwise.

        That says nothing of a step that does not repeat itself, which is none that can be compiled.
        """
        losses, state = self._take(self.shown, before, minibatch, mean_rows)
        repeats = torch.equal(losses, shown[0]) and all(map(torch.equal, state, shown[1]))
        moved = [
            self._take(self.shown, before._replace(weights=weights), minibatch, mean_rows)
            for weights in rounded_otherwise(before.weights)
        ]
        return not self.is_on_any_rank(not repeats or bool(self._difference(before, shown, fast, moved)))

    def _take(self, step: GradientStep, before: AdamState, minibatch: Batch, mean_rows: float) -> Outcome:
        """Take a step from a state; return its losses, and the state to which it led."""
        self._set(before)
        losses = step(minibatch, mean_rows)
        return losses, AdamState(*(tensor.clone() for tensor in self.state))

    def _difference(self, before: AdamState, shown: Outcome, fast: Outcome, moved: Sequence[Outcome] = ()) -> str:
        """Return in what the two ways differ by more than rounding, empty if in nothing.

        Args:
            before: the state from which both went.
            shown: what the step of the script led to.
            fast: what the fast one led to.
            moved: to what the step of the script led from weights that were rounded otherwise.
        """
        (shown_losses, ours), (fast_losses, theirs) = shown, fast
        slack = sum((losses - shown_losses).abs() for losses, _ in moved)
        if not ((shown_losses - fast_losses).abs() <= 1e-4 + 1e-3 * fast_losses.abs() + slack).all():
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
        averages = [state.exp_avg for _, state in moved]
        mean_squares = [state.exp_avg_sq for _, state in moved]
        weights = [state.weights for _, state in moved]
        floors = (1e-6 * ours.exp_avg.norm(), 1e-6 * ours.exp_avg_sq.norm(), 2e-7 * ours.weights.norm())
        checks: tuple[tuple[str, Tensor, Tensor, list[Tensor], Tensor, float, Tensor], ...] = (
            ("the gradient", ours.exp_avg, theirs.exp_avg, averages, gradient, 1e-4, floors[0]),
            ("the squared gradient", ours.exp_avg_sq, theirs.exp_avg_sq, mean_squares, squares, 1e-3, floors[1]),
            ("what follows Adam", ours.weights, before.weights - change, [], change, 1e-5, floors[2]),
            ("the weights", ours.weights, theirs.weights, weights, change, 1e-2, floors[2]),
        )
        for what, one, other, others, scale, relative, absolute in checks:
            floor = relative * 1e-2 * scale.norm() + absolute
            tensors = (one - other, scale, *(tensor - one for tensor in others))
            pieces = zip(self.names, *(tensor.split(self.sizes) for tensor in tensors), strict=True)
            for name, error, size, *moves in pieces:
                if not error.norm() <= relative * size.norm() + floor + sum(move.norm() for move in moves):
                    return f"{what} of {name} differs"
        return ""

    def _step_aside(self, reason: str) -> None:
        self.is_proven = False
        if reason:
            say_first("compiled", f"going on without compilation: {reason}")

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
