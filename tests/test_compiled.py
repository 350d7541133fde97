"""The compiled gradient step does what the lines in the scripts do."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import nn

from rl.args import CommonArgs
from rl.environments.making import read_spaces
from rl.fast.flat import AdamState
from rl.fast.gradient_step import CPP, ProvenStep, compile_gradient_step
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss
from rl.presets import PRESETS
from tests.launching import python, run

CASES = {
    "means, clipped values": CommonArgs(
        env_id="Pendulum-v1", activation_function="tanh", clip_vloss=True, ent_coef=0.01, max_grad_norm=0.1
    ),
    "many choices": CommonArgs(env_id="tests.spaces_env:Grid-v0", hidden_sizes=(16,)),
}


class Learner:
    """An agent, its optimizer and the lines of the scripts; in float64, where rounding hides nothing (but images)."""

    def __init__(self, args, spaces=None, dtype=torch.float64):
        torch.manual_seed(0)
        self.args = replace(args, compile=True)
        self.agent = Agent(*(spaces or read_spaces(args)), args)
        if not self.agent.encoder.images:
            self.agent.to(dtype)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.agent.parameters()])

    def plain_step(self, minibatch, mean_rows):
        losses = ppo_loss(self.agent, minibatch, mean_rows, self.args)
        self.optimizer.zero_grad()
        losses.loss.backward()
        nn.utils.clip_grad_norm_(self.agent.parameters(), self.args.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        return torch.stack(losses).detach()

    def compiled_step(self, rows, group=None):
        num_rows = rows * (2 if group else 1)
        return compile_gradient_step(self.plain_step, self.agent, self.optimizer, self.args, num_rows, group)

    def minibatch(self, rows, seed=0):
        """Rows in which ratios and values leave their bounds, though not all of them."""
        rng = np.random.default_rng(seed)

        def normal(like):
            return torch.from_numpy(rng.standard_normal(like.shape)).to(like)

        zeros = Batch.zeros(rows, self.agent)
        observations = normal(zeros.observations) if zeros.observations.is_floating_point() else zeros.observations
        noise = torch.from_numpy(self.agent.distribution.draw_noise(rng, rows)).to(zeros.values)
        with torch.no_grad():
            actions = self.agent.act(observations, noise).to(zeros.actions)
            log_probs, _, values = self.agent(observations, actions)
        batch = Batch(observations, actions, log_probs, values, normal(values), normal(values))
        return batch._replace(log_probs=log_probs + 0.2 * normal(values), values=values + 0.3 * normal(values))


def without_native(monkeypatch):
    monkeypatch.setattr("rl.fast.gradient_step.make_native_step", lambda *args: None)


def without_traced(monkeypatch):
    monkeypatch.setattr("rl.fast.traced.make_traced_step", None)  # called, it is a failure


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()


@pytest.fixture
def groups_of_two(monkeypatch):
    """A group of two processes is a function here, which returns the sum of a tensor and the other's."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.copy_(group(tensor)))


@pytest.fixture(params=CASES.values(), ids=CASES)
def learners(request):
    return Learner(request.param), Learner(request.param)


def assert_alike(one, other):
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)  # the share of clipped ratios is always float32


@pytest.mark.parametrize("without_the_other", [without_traced, without_native], ids=["native", "traced"])
def test_it_takes_the_same_steps_and_stops_at_a_gradient_that_is_not_finite(learners, without_the_other, monkeypatch):
    without_the_other(monkeypatch)
    plain, compiled = learners
    steps = [(7, 1e-3), (7, 5e-4), (6, 5e-4), (7, 1e-4)]
    warm_up = plain.minibatch(7, seed=9)
    for learner in learners:
        learner.plain_step(warm_up, 7)  # Adam's moments must be taken over
    step = compiled.compiled_step(7)
    before = copy.deepcopy(compiled.agent.state_dict())
    for seed, (rows, learning_rate) in enumerate(steps):
        minibatch = plain.minibatch(rows, seed)
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = learning_rate
        assert_alike(step(minibatch, rows - 0.5), plain.plain_step(minibatch, rows - 0.5))
        assert step.is_proven
    assert_alike(compiled.agent.state_dict(), plain.agent.state_dict())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in compiled.agent.state_dict().items())

    resumed = Learner(plain.args)  # without compilation, from what a checkpoint holds
    resumed.agent.load_state_dict(compiled.agent.state_dict())
    resumed.optimizer.load_state_dict(compiled.optimizer.state_dict())
    assert_alike(resumed.plain_step(warm_up, 7), plain.plain_step(warm_up, 7))
    assert_alike(resumed.agent.state_dict(), plain.agent.state_dict())
    states = resumed.optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"]
    assert {state["step"].item() for state in states[0].values()} == {len(steps) + 2}
    assert_alike(*states)

    with pytest.raises(RuntimeError, match="non-finite"):
        step(minibatch._replace(returns=minibatch.returns + torch.inf), rows)


VECTOR = Box(-1, 1, (5,))
# What C++ knows: features, distributions, layers and options, and rows of which one chunk, or several, are not full.
NATIVE = {
    "defaults": (37, Discrete(3), {}),
    "tanh, all options": (
        130,
        Discrete(3),
        {"activation_function": "tanh", "clip_vloss": True, "ent_coef": 0.05, "ortho_init": True, "vf_coef": 0.7},
    ),
    "one hidden layer": (64, Discrete(2), {"hidden_sizes": (7,), "max_grad_norm": 0.01}),
    "three hidden layers": (65, Discrete(17), {"hidden_sizes": (16, 33, 9), "ent_coef": 0.01, "clip_coef": 0.05}),
    "one motor": (37, Box(-1, 1, (1,)), {"clip_vloss": True}),
    "four motors": (100, Box(-1, 1, (2, 2)), {"ent_coef": 0.01, "activation_function": "tanh"}),
    "one row": (1, Box(-1, 1, (4,)), {"ortho_init": True}),
    "several choices": (70, MultiDiscrete([3, 2, 5]), {"ent_coef": 0.05, "max_grad_norm": 1000.0}),
    "switches": (70, MultiBinary(6), {"ent_coef": 0.05, "clip_vloss": True}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_in_cpp_it_takes_the_same_steps(name, dtype, monkeypatch):
    without_traced(monkeypatch)
    rows, action_space, options = NATIVE[name]
    args = CommonArgs(**options)
    plain, native = (Learner(args, (VECTOR, action_space), dtype) for _ in range(2))
    before, step = plain.weights(), native.compiled_step(rows)
    exact = dtype == torch.float64
    for seed in range(4):
        minibatch = plain.minibatch(rows, seed)
        torch.testing.assert_close(
            step(minibatch, rows - 0.5),
            plain.plain_step(minibatch, rows - 0.5),
            rtol=1e-7 if exact else 1e-4,
            atol=1e-10 if exact else 1e-5,
        )
        assert step.is_proven
    moved = (plain.weights() - before).norm()
    assert 0 < (native.weights() - plain.weights()).norm() < (1e-9 if exact else 1e-3) * moved


def test_several_processes_take_a_step_with_the_mean_of_their_gradients(monkeypatch, groups_of_two):
    without_traced(monkeypatch)
    learners = [Learner(CommonArgs(hidden_sizes=(8,)), (VECTOR, Discrete(3))) for _ in range(3)]
    plain, *ranks = learners
    minibatch = plain.minibatch(20)
    halves = [Batch(*(field[part::2] for field in minibatch)) for part in range(2)]
    gradients = []

    def first_sum(tensor):  # what the first rank sends is kept for the second
        gradients.append(tensor.clone())
        return tensor

    def second_sum(tensor):
        return tensor + gradients[-1] if len(tensor) > 1 else tensor

    steps = [rank.compiled_step(10, total) for rank, total in zip(ranks, (first_sum, second_sum), strict=True)]
    losses = [step.fast(half, 10) for step, half in zip(steps, halves, strict=True)]
    whole = plain.plain_step(minibatch, 20)
    assert_alike(torch.stack(losses).mean(0), whole)
    assert_alike(ranks[1].weights(), plain.weights())


def test_where_another_process_compiles_otherwise_none_goes_on_with_it(capsys, groups_of_two):
    learner, other = (Learner(CommonArgs(hidden_sizes=(8,)), (VECTOR, Discrete(3))) for _ in range(2))
    step, minibatch = learner.compiled_step(16, lambda flag: flag + 1), other.minibatch(16)
    for _ in range(2):
        assert torch.equal(step(minibatch, 16), other.plain_step(minibatch, 16))
    assert torch.equal(learner.weights(), other.weights())
    assert capsys.readouterr().err.count("going on without compilation: another process compiles otherwise") == 1


def test_where_the_loss_or_the_agent_is_edited_pytorch_compiles_it_and_a_line_says_so(monkeypatch, capsys):
    def edited(*inputs, ppo_loss=ppo_loss):
        losses = ppo_loss(*inputs)
        return losses._replace(loss=losses.loss + 1e-2 * losses.value_loss)

    learner = Learner(CommonArgs(hidden_sizes=(8,)), (VECTOR, Discrete(3)))
    for module in ("rl.fast.native", "rl.fast.traced", __name__):
        monkeypatch.setattr(f"{module}.ppo_loss", edited)
    step, minibatch = learner.compiled_step(16), learner.minibatch(16)
    other = Learner(learner.args, (VECTOR, Discrete(3)))
    assert_alike(step(minibatch, 16), other.plain_step(minibatch, 16))
    assert_alike(learner.weights(), other.weights())
    said = capsys.readouterr().err
    assert step.is_proven and "without compilation" not in said
    assert said.count("PyTorch compiles the gradient step, C++ does not: the losses differ") == 1


def test_a_minibatch_of_another_shape_or_type_is_no_access_to_foreign_memory(monkeypatch):
    without_traced(monkeypatch)
    learner = Learner(CommonArgs(hidden_sizes=(8,)), (VECTOR, Discrete(3)))
    step, minibatch = learner.compiled_step(16), learner.minibatch(16)
    for wrong in (minibatch.observations[:, :4], minibatch.observations[:8], minibatch.observations.float()):
        with pytest.raises(ValueError, match="minibatch"):
            step.fast(minibatch._replace(observations=wrong), 16)


def test_with_a_convolutional_network_it_takes_the_same_step_but_for_the_rounding_of_float32(capsys):
    args = CommonArgs(env_id="tests.spaces_env:PictureAndVector-v0")
    plain, compiled = Learner(args), Learner(args)
    before, step = compiled.weights(), compiled.compiled_step(7)
    minibatch = plain.minibatch(7)
    torch.testing.assert_close(step(minibatch, 7), plain.plain_step(minibatch, 7), rtol=1e-4, atol=1e-5)
    assert step.is_proven and "C++" not in capsys.readouterr().err  # nothing is amiss
    moved = (plain.weights() - before).norm()
    assert 0 < (compiled.weights() - plain.weights()).norm() < 1e-3 * moved


def test_without_a_compiler_a_line_says_so_and_training_goes_on_without(tmp_path):
    flags = ["--total-timesteps=1024", "--num-steps=512", "--test-episodes=1"]
    environment = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with_flag = run(python("train_torch.py", "--compile", *flags), tmp_path, timeout=90, env=environment)
    without = run(python("train_torch.py", "--no-compile", *flags), tmp_path, timeout=60)
    assert with_flag.returncode == without.returncode == 0, with_flag.output + without.output
    (line,) = (line for line in with_flag.stderr.splitlines() if "without compilation" in line)
    assert "No working C++ compiler" in line
    weights = [torch.load(path, weights_only=True)["agent"] for path in tmp_path.glob("logs/*/*/checkpoints/*2.ckpt")]
    assert len(weights) == 2 and all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(("flag", "steps", "compiles"), [(None, 1_000, False), (None, 10_000, True), (True, 1, True)])
def test_only_a_run_of_many_gradient_steps_is_compiled_unless_a_flag_says_so(flag, steps, compiles):
    args = CommonArgs(num_steps=100, per_rank_batch_size=50, update_epochs=1, total_timesteps=50 * max(steps, 2))
    assert args.num_updates * 2 == max(steps, 2)
    assert CommonArgs(**vars(args) | {"compile": flag}).compiles(100, world_size=1) == compiles


def test_the_lunarlander_preset_is_compiled_alone_and_on_two_trainers():
    args = CommonArgs(**PRESETS["lunar-lander"].flags)
    assert [args.compiles(args.num_steps, world_size) for world_size in (1, 2)] == [True, True]


class Step(NamedTuple):
    """An edit of the gradient step, or of the optimizer, and what is said about it."""

    loss: Callable = lambda losses, agent: losses.loss
    afterwards: Callable = lambda agent: None
    optimizer: Callable = lambda agent: torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5)
    words: str = ""


@torch.no_grad()
def shrink(agent):
    for parameter in agent.parameters():
        parameter *= 1 - 1e-5


def squared_weights(agent):
    return sum(parameter.square().sum() for parameter in agent.parameters())


EDITS = {
    "none": Step(),
    "an L2 term": Step(lambda losses, agent: losses.loss + 1e-5 * squared_weights(agent), words="gradient of actor.0"),
    "another weight": Step(lambda losses, agent: losses.loss + 1e-3 * losses.value_loss, words="the gradient of"),
    "smaller weights": Step(afterwards=shrink, words="what follows Adam of actor.0.weight differs"),
    "AdamW": Step(optimizer=lambda agent: torch.optim.AdamW(agent.parameters(), lr=1e-3), words="not AdamW"),
    "SGD": Step(optimizer=lambda agent: torch.optim.SGD(agent.parameters(), lr=1e-3), words="not SGD"),
    "two groups": Step(
        optimizer=lambda agent: torch.optim.Adam(
            [{"params": part.parameters()} for part in (agent.actor, agent.critic)]
        ),
        words="2 groups of parameters",
    ),
    "amsgrad": Step(optimizer=lambda agent: torch.optim.Adam(agent.parameters(), amsgrad=True), words="not Adam"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_gradient_step_takes_effect_and_one_line_says_that_nothing_is_compiled(name, capsys):
    edit = EDITS[name]
    args = CommonArgs(compile=True)
    torch.manual_seed(0)
    agents = [Agent(*read_spaces(args), args) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    optimizers = [edit.optimizer(agent) for agent in agents]

    def gradient_step(agent, optimizer, minibatch, rows):
        losses = ppo_loss(agent, minibatch, rows, args)
        optimizer.zero_grad()
        edit.loss(losses, agent).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        edit.afterwards(agent)
        return torch.stack(losses).detach()

    shown, other = (partial(gradient_step, *pair) for pair in zip(agents, optimizers, strict=True))
    minibatch = Learner(args, dtype=torch.float32).minibatch(32)
    step = compile_gradient_step(shown, agents[0], optimizers[0], args, 32)
    for _ in range(3):
        torch.testing.assert_close(step(minibatch, 32), other(minibatch, 32), rtol=1e-4, atol=1e-6)
    weights = [torch.cat([parameter.flatten() for parameter in agent.parameters()]) for agent in agents]
    said = capsys.readouterr().err
    if name == "none":
        assert "without compilation" not in said
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(*weights)
        assert said.count("going on without compilation") == 1 and edit.words in said


def test_an_edit_that_takes_effect_later_is_found_later(capsys, monkeypatch):
    monkeypatch.setattr("rl.fast.gradient_step.PROVE_EVERY", 5)
    learner = Learner(CommonArgs(hidden_sizes=(8,)))
    plain, taken = learner.plain_step, []

    def edited(minibatch, rows):
        losses = plain(minibatch, rows)
        taken.append(losses)
        if len(taken) > 1:
            shrink(learner.agent)
        return losses

    learner.plain_step = edited
    step = learner.compiled_step(16)
    for count in range(1, 9):
        step(learner.minibatch(16), 16)
        assert ("without compilation" in capsys.readouterr().err) == (count == 6)


def test_one_row_on_an_edge_of_the_loss_does_not_end_compilation(capsys):
    """Where a unit of the network is exactly off for one row, rounding decides whether it learns from that row."""
    minibatch = Learner(CommonArgs(hidden_sizes=(8,))).minibatch(16)
    differing = 5

    def shown(batch, rows):
        on_the_edge = (batch.observations == minibatch.observations[differing]).all(-1).any()
        return take(batch, 1.0 + on_the_edge)

    def take(batch, value):
        state.weights.add_(value)
        state.steps.add_(1)
        return torch.zeros(6)

    state = AdamState(*(torch.zeros(1) for _ in range(4)))
    group = {"lr": 0.0, "eps": 1e-5, "betas": (0.9, 0.999)}
    step = ProvenStep(
        shown, lambda batch, rows: take(batch, 1.0), CPP, "", state, group, ["w"], [1], lambda tensor: tensor
    )
    state.exp_avg_sq.fill_(1)
    step._difference = lambda before, one, other, moved=(): (
        "the weights" * (not torch.equal(one[1].weights, other[1].weights))
    )
    step(minibatch, 16)
    assert step.is_proven and state.weights == 1  # what the fast way did stands
    assert capsys.readouterr().err == ""


def learner_of_large_values():
    """A learner of float32, and alike rows whose values are large and whose errors, of which it learns, cancel out."""
    learner = Learner(CommonArgs(), dtype=torch.float32)
    with torch.no_grad():
        learner.agent.critic[2].bias.fill_(1)
        learner.agent.critic[4].weight.fill_(15)
    minibatch = learner.minibatch(64)
    minibatch = minibatch._replace(observations=0.1 * minibatch.observations)
    with torch.no_grad():
        values = learner.agent(minibatch.observations, minibatch.actions)[2]
    errors = minibatch.returns - minibatch.returns.mean() + 0.01
    return learner, minibatch._replace(values=values, returns=values + errors)


def test_where_rounding_decides_on_the_gradient_compilation_does_not_end(capsys):
    learner, minibatch = learner_of_large_values()
    step = learner.compiled_step(64)
    step(minibatch, 64)
    assert step.is_proven and step.way == CPP
    assert capsys.readouterr().err.count("\n") == 1  # it compiles


@pytest.mark.parametrize("growth", [1, 1.2], ids=["edited", "edited anew in each step"])
def test_an_edit_is_found_where_rounding_decides_on_the_gradient(growth, capsys):
    learner, minibatch = learner_of_large_values()
    plain, count = learner.plain_step, 0

    def edited(batch, mean_rows):
        nonlocal count
        count += 1
        learner.args.vf_coef = 0.6 * growth**count
        losses = plain(batch, mean_rows)
        learner.args.vf_coef = 0.5
        return losses

    learner.plain_step = edited
    step = learner.compiled_step(64)
    step(minibatch, 64)
    assert not step.is_proven and "going on without compilation" in capsys.readouterr().err
