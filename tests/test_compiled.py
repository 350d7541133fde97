"""The compiled gradient step does what the lines in the scripts do."""

import copy

import pytest
import torch
from torch import nn

from rl.agent import Agent
from rl.args import CommonArgs
from rl.compiled import compile_gradient_step
from rl.envs import read_spaces
from rl.loss import ppo_loss
from rl.minibatch import Batch
from tests.launching import python, run

CASES = {
    "means, clipped values": CommonArgs(
        env_id="Pendulum-v1", activation_function="tanh", clip_vloss=True, ent_coef=0.01, max_grad_norm=0.1
    ),
    "many choices": CommonArgs(env_id="tests.spaces_env:Grid-v0", hidden_sizes=(16,)),
}


class Learner:
    """An agent, its optimizer and the lines of the scripts; in float64, where rounding hides nothing (but images)."""

    def __init__(self, args):
        torch.manual_seed(0)
        self.args = args
        self.observation_space, action_space = read_spaces(args)
        self.agent = Agent(self.observation_space, action_space, args)
        if not self.agent.encoder.images:
            self.agent.double()
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.agent.parameters()])

    def plain_step(self, minibatch, rows):
        losses = ppo_loss(self.agent, minibatch, rows, self.args)
        self.optimizer.zero_grad()
        losses.loss.backward()
        nn.utils.clip_grad_norm_(self.agent.parameters(), self.args.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        return torch.stack(losses).detach()

    def compiled_step(self, rows):
        return compile_gradient_step(
            self.plain_step, self.agent, self.optimizer, self.args, self.minibatch(rows), lambda tensor: tensor, 1
        )

    def minibatch(self, rows, seed=0):
        torch.manual_seed(seed)
        zeros = Batch.zeros(rows, self.observation_space, self.agent.distribution)
        dtype = next(self.agent.parameters()).dtype
        batch = Batch(*(torch.randn_like(field).to(dtype) if field.is_floating_point() else field for field in zeros))
        old_log_probs = self.agent(batch.observations, batch.actions)[0].detach() + 0.1 * batch.log_probs
        return batch._replace(log_probs=old_log_probs)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()


@pytest.fixture(params=CASES.values(), ids=CASES)
def learners(request):
    return Learner(request.param), Learner(request.param)


def assert_alike(one, other):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_it_takes_the_same_steps_and_stops_at_a_gradient_that_is_not_finite(learners):
    plain, compiled = learners
    steps = [(7, 1e-3), (7, 5e-4), (6, 5e-4), (7, 1e-4)]
    warm_up = plain.minibatch(7, seed=9)
    for learner in learners:
        learner.plain_step(warm_up, 7)  # Adam's moments must be taken over
    step = compiled.compiled_step(7)
    assert step != compiled.plain_step
    before = copy.deepcopy(compiled.agent.state_dict())
    for seed, (rows, learning_rate) in enumerate(steps):
        minibatch = plain.minibatch(rows, seed)
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = learning_rate
        assert_alike(step(minibatch, rows - 0.5), plain.plain_step(minibatch, rows - 0.5))
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


def test_with_a_convolutional_network_it_takes_the_same_step_but_for_the_rounding_of_float32():
    args = CommonArgs(env_id="tests.spaces_env:PictureAndVector-v0")
    plain, compiled = Learner(args), Learner(args)
    before, step = compiled.weights(), compiled.compiled_step(7)
    assert step != compiled.plain_step
    minibatch = plain.minibatch(7)
    torch.testing.assert_close(step(minibatch, 7), plain.plain_step(minibatch, 7), rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize(("flag", "steps", "compiles"), [(None, 10_000, False), (None, 10**7, True), (True, 1, True)])
def test_only_a_run_of_many_gradient_steps_is_compiled_unless_a_flag_says_so(flag, steps, compiles):
    args = CommonArgs(num_steps=100, per_rank_batch_size=50, update_epochs=1, total_timesteps=50 * max(steps, 2))
    assert args.num_updates * 2 == max(steps, 2)
    assert CommonArgs(**vars(args) | {"compile": flag}).compiles(world_size=1) == compiles
