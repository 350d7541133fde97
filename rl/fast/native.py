"""The gradient step of perceptrons in C++: `gradient_step.cpp`, compiled once on a machine, and how it is called."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability

from rl.args import CommonArgs
from rl.fast.flat import FastStep, FlatAdam, rounded_otherwise
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.distributions import Bernoulli, Categorical, DiagonalGaussian, MultiCategorical
from rl.ppo.loss import ppo_loss
from rl.voice import say_first

SOURCE = Path(__file__).with_name("gradient_step.cpp")
# No -ffast-math: infinities and NaN keep their meaning.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx512dq", "-mavx2", "-mfma")}
REALS = {torch.float32: "float", torch.float64: "double"}
KINDS = {Categorical: 0, MultiCategorical: 0, Bernoulli: 1, DiagonalGaussian: 2}
MOST_WEIGHTS = 500_000  # of larger networks PyTorch's matrix products are as fast, and almost all that takes time
PROOF_ROWS = 70  # more than go through the networks at once


def make_native_step(
    agent: Agent, args: CommonArgs, flat: FlatAdam, average: Callable[[Tensor], Tensor] | None
) -> FastStep | None:
    """Return a function that takes a gradient step and returns the norm of the gradient and what `Losses` holds, [6].

    None where the agent is not two perceptrons on the CPU, or large ones. None too, with a line, where there is no C++
    compiler, or where the gradient of random rows is not that of `ppo_loss`: agent or loss were edited.

    Args:
        agent: the plain one.
        args: of the run.
        flat: the weights and their Adam.
        average: averages the gradient over the ranks, if there are several.
    """
    template = Batch.zeros(0, agent)
    description = _describe(agent, flat, template)
    if description is None:
        return None
    try:
        step = NativeStep(load_cpp(REALS[flat.state.weights.dtype]), description, args, flat, template, average)
        reason = _difference(step, agent, args, flat, template)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().partition("\n")[0] or str(error)
    except Exception as error:  # there may be no compiler, no folder, or an agent of another make
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if not reason:
        return step
    say_first("native", f"PyTorch compiles the gradient step, C++ does not: {reason}")
    return None


class NativeStep:
    """Takes gradient steps with `gradient_step.cpp`.

    Args:
        cpp: what was compiled.
        description: of the agent, the arguments of `make_agent`.
        args: of the run; read in each step.
        flat: the weights and their Adam.
        template: a batch without rows, of the shapes and types that will come.
        average: averages the gradient over the ranks, if there are several.
    """

    def __init__(
        self,
        cpp: ctypes.CDLL,
        description: list[Any],
        args: CommonArgs,
        flat: FlatAdam,
        template: Batch,
        average: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.cpp, self.args, self.flat, self.average = cpp, args, flat, average
        self.agent = cpp.make_agent(*description)
        self.columns = [(field.dtype, prod(field.shape[1:])) for field in template]
        self.gradient = torch.zeros_like(flat.state.weights)

    def __call__(self, minibatch: Batch, mean_rows: float) -> tuple[float, Tensor]:
        """Take a gradient step; return the norm of the gradient and what `Losses` holds, [6]."""
        losses = self.compute_gradient(minibatch, mean_rows)
        gradient = self.average(self.gradient) if self.average else self.gradient
        group, state = self.flat.group, self.flat.state
        norm = self.cpp.descend(
            len(gradient),
            gradient.data_ptr(),
            state.weights.data_ptr(),
            state.exp_avg.data_ptr(),
            state.exp_avg_sq.data_ptr(),
            len(state.steps),
            state.steps.data_ptr(),
            self.args.max_grad_norm,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        return norm, losses

    def compute_gradient(self, minibatch: Batch, mean_rows: float) -> Tensor:
        """Leave the gradient of a minibatch in `gradient`; return what `Losses` holds, [6].

        Raises:
            ValueError: if it has other shapes or types than the template.
        """
        num_rows = minibatch.num_rows
        for field, (dtype, columns) in zip(minibatch, self.columns, strict=True):
            if field.dtype != dtype or field.numel() != num_rows * columns:
                raise ValueError(f"a minibatch has a field {field.dtype} {list(field.shape)}")
        fields = [field.contiguous() for field in minibatch]
        losses = self.gradient.new_empty(6)
        self.cpp.compute_gradient(
            self.agent,
            self.flat.state.weights.data_ptr(),
            *[field.data_ptr() for field in fields],
            num_rows,
            mean_rows,
            self.args.clip_coef,
            self.args.vf_coef,
            self.args.ent_coef,
            self.args.clip_vloss,
            self.gradient.data_ptr(),
            losses.data_ptr(),
        )
        return losses


def load_cpp(real: str) -> ctypes.CDLL:
    """Compile `gradient_step.cpp`, unless that was done before, and load it.

    Args:
        real: the type of its numbers, float or double.

    Raises:
        OSError, subprocess.SubprocessError: if there is no compiler, or if it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *FLAGS, *INSTRUCTIONS.get(get_cpu_capability(), ()), f"-DREAL={real}"]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((command, platform.machine())).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ppo_gradient_step")
    path = folder / f"{key[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # other processes see the whole file or none
            output = Path(temporary, path.name)
            subprocess.run([*command, str(SOURCE), "-o", str(output)], check=True, capture_output=True, timeout=60)
            output.rename(path)
    cpp = ctypes.CDLL(str(path))
    sizes_and_offsets = (c_int64, c_void_p, c_void_p)
    cpp.make_agent.argtypes = [c_int64, *sizes_and_offsets, *sizes_and_offsets, c_int64, c_int64, c_void_p, c_int64]
    cpp.make_agent.restype = c_void_p
    cpp.compute_gradient.argtypes = [*[c_void_p] * 8, c_int64, *[c_double] * 4, c_int64, c_void_p, c_void_p]
    cpp.compute_gradient.restype = None
    cpp.descend.argtypes = [c_int64, *[c_void_p] * 4, c_int64, c_void_p, *[c_double] * 6]
    cpp.descend.restype = c_double
    return cpp


def _describe(agent: Agent, flat: FlatAdam, template: Batch) -> list[Any] | None:
    """Return the arguments of `make_agent`, None if C++ does not know such an agent."""
    weights = flat.state.weights
    offsets = dict(zip(flat.named, accumulate(flat.sizes, initial=0), strict=False))
    unknown = set(offsets)
    activations: set[type[nn.Module]] = set()
    perceptrons: list[Any] = []
    try:
        distribution = agent.distribution
        for name, num_outputs in (("actor", distribution.num_outputs), ("critic", 1)):
            layers = list(getattr(agent, name))
            sizes = [layer.in_features for layer in layers[::2]] + [num_outputs]
            parameters = [f"{name}.{2 * i}.{kind}" for i in range(len(sizes) - 1) for kind in ("weight", "bias")]
            shapes = [shape for inputs, outputs in pairwise(sizes) for shape in ((outputs, inputs), (outputs,))]
            if (
                any(type(layer) is not nn.Linear for layer in layers[::2])
                or [tuple(flat.named[parameter].shape) for parameter in parameters] != shapes
                or template.observations.shape != (0, sizes[0])
            ):
                return None
            activations |= {type(layer) for layer in layers[1::2]}
            unknown -= set(parameters)
            perceptrons += [len(sizes) - 1, _integers(sizes), _integers([offsets[name] for name in parameters])]
    except (AttributeError, KeyError, TypeError):  # an agent of another make
        return None
    kind = type(distribution)
    if kind is DiagonalGaussian:
        unknown -= {"distribution.log_std"}
    is_known = not unknown and kind in KINDS and activations in ({nn.ReLU}, {nn.Tanh}) and weights.dtype in REALS
    if (
        not is_known
        or len(weights) > MOST_WEIGHTS
        or weights.device.type != "cpu"
        or template.observations.dtype != weights.dtype
    ):
        return None
    choices = distribution.sizes if isinstance(distribution, MultiCategorical) else [distribution.num_outputs]
    log_std = offsets.get("distribution.log_std", 0)
    return [nn.Tanh in activations, *perceptrons, KINDS[kind], len(choices), _integers(choices), log_std]


def _integers(values: list[int]) -> ctypes.Array:
    return (c_int64 * len(values))(*values)


def _difference(step: NativeStep, agent: Agent, args: CommonArgs, flat: FlatAdam, template: Batch) -> str:
    """Return in what the gradient of random rows differs from that of `ppo_loss`, empty if in nothing."""
    minibatch = _random_rows(agent, template)
    weights = flat.state.weights
    before = weights.clone()

    def losses_and_gradients() -> tuple[Tensor, list[Tensor]]:
        losses = ppo_loss(agent, minibatch, PROOF_ROWS, args)
        return torch.stack(losses).detach(), list(torch.autograd.grad(losses.loss, list(flat.named.values())))

    fast_losses = step.compute_gradient(minibatch, PROOF_ROWS)
    losses, gradients = losses_and_gradients()
    moved = []
    try:
        for at in rounded_otherwise(before):
            weights.copy_(at)
            moved.append(losses_and_gradients())
    finally:
        weights.copy_(before)
    slack = sum((other - losses).abs() for other, _ in moved)
    if not ((losses - fast_losses).abs() <= 1e-4 + 1e-3 * fast_losses.abs() + slack).all():
        return "the losses differ"
    floor = 1e-6 * step.gradient.norm()
    pieces = zip(flat.named, step.gradient.split(flat.sizes), gradients, *(others for _, others in moved), strict=True)
    for name, piece, ours, *others in pieces:
        error = (ours.flatten() - piece[: ours.numel()]).norm()
        if not error <= 1e-4 * ours.norm() + floor + sum((other - ours).norm() for other in others):
            return f"the gradient of {name} differs"
    return ""


@torch.no_grad()
def _random_rows(agent: Agent, template: Batch) -> Batch:
    """Return rows in which ratios and values leave their bounds, though not all of them."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(template.observations)

    observations = normal(PROOF_ROWS, *template.observations.shape[1:])
    noise = torch.from_numpy(agent.distribution.draw_noise(rng, PROOF_ROWS)).to(observations)
    actions = agent.act(observations, noise).to(template.actions)
    log_probs, _, values = agent(observations, actions)
    old_log_probs, old_values = log_probs + 0.3 * normal(PROOF_ROWS), values + 0.3 * normal(PROOF_ROWS)
    return Batch(observations, actions, old_log_probs, old_values, normal(PROOF_ROWS), values + normal(PROOF_ROWS))
