"""Environments that nobody tuned for: a few steps in each, and one gradient step on what they gave."""

from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl.args import CommonArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.distributions import draw_action_noise
from rl.ppo.gae import generalized_advantage_estimation
from rl.ppo.loss import ppo_loss
from rl.ppo.normalize import moments, normalize_advantages
from tests.spaces_env import GRID, MOTORS, PICTURE_AND_VECTOR, SWITCHES

STEPS, ENVS = 12, 2
# Steps after which an episode is cut. Atari's counts frames, some of which pass in a reset, which takes half a second.
LIMIT, ATARI_LIMIT = 5, 48
DICT_SIZE = 40 * 44 * 3 + 3 + 4

# What the learner is given of an observation, and what it keeps of an action.
ENVIRONMENTS = {
    "Taxi-v4": ((500,), torch.float32, (), torch.int64),
    "Blackjack-v1": ((45,), torch.float32, (), torch.int64),
    "FrozenLake-v1": ((16,), torch.float32, (), torch.int64),
    "Pendulum-v1": ((3,), torch.float32, (1,), torch.float32),
    "BipedalWalker-v3": ((24,), torch.float32, (4,), torch.float32),
    "CarRacing-v3": ((96, 96, 3), torch.uint8, (3,), torch.float32),
    "MinAtar/Breakout-v1": ((10, 10, 4), torch.uint8, (), torch.int64),
    "ALE/Pong-v5": ((4, 84, 84), torch.uint8, (), torch.int64),
    "tests.spaces_env:PictureAndVector-v0": ((DICT_SIZE,), torch.float32, (), torch.int64),
    "tests.spaces_env:Grid-v0": ((3,), torch.float32, (4,), torch.int64),
    "tests.spaces_env:Switches-v0": ((3,), torch.float32, (6,), torch.int8),
    "tests.spaces_env:Motors-v0": ((3,), torch.float32, (3,), torch.float32),
}


class Training:
    """One rollout of STEPS steps in ENVS environments, and the batch that is made of it."""

    def __init__(self, env_id):
        limit = ATARI_LIMIT if env_id.startswith("ALE/") else LIMIT
        self.args = args = CommonArgs(
            env_id=env_id,
            env_kwargs=(f"max_episode_steps={limit}",),
            num_envs=ENVS,
            num_steps=STEPS * ENVS,
            activation_function="tanh",
            ent_coef=0.01,
            normalize_observations=env_id == "tests.spaces_env:PictureAndVector-v0",
        )
        torch.manual_seed(0)
        self.observation_space, self.action_space = read_spaces(args)
        self.agent = Agent(self.observation_space, self.action_space, args)
        self.envs = make_envs(args, ENVS)
        noise = draw_action_noise(self.agent.distribution, STEPS, range(ENVS), args.seed, update=1)
        first = reset_envs(self.envs, args.seed, 0)
        self.rollout, _, self.episodes = collect_rollout(self.agent, self.envs, first, noise)
        self.envs.close()
        rollout = self.rollout
        advantages = generalized_advantage_estimation(
            rollout.rewards, rollout.values, rollout.next_values, rollout.dones, args.gamma, args.gae_lambda
        )
        normalized = normalize_advantages(advantages, moments(advantages))
        self.batch = Batch.from_rollout(rollout, normalized, advantages + rollout.values)


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def training(request):
    """Each environment is made and stepped once for all tests."""
    if request.param.startswith("ALE/") and not (find_spec("ale_py") and find_spec("cv2")):
        pytest.skip("Atari is optional: requirements-atari.txt")
    if request.param.startswith("MinAtar/") and not find_spec("minatar"):
        pytest.skip("MinAtar is optional: requirements-minatar.txt")
    return Training(request.param)


def test_the_rollout_has_the_shapes_and_types_of_the_spaces_and_is_finite(training):
    shape, dtype, action_shape, action_dtype = ENVIRONMENTS[training.args.env_id]
    rollout = training.rollout
    assert (rollout.raw_observations.shape, rollout.raw_observations.dtype) == ((STEPS, ENVS, *shape), dtype)
    assert (rollout.observations.shape, rollout.observations.dtype) == ((STEPS, ENVS, *shape), dtype)
    assert (rollout.actions.shape, rollout.actions.dtype) == ((STEPS, ENVS, *action_shape), action_dtype)
    assert all(field.isfinite().all() for field in rollout[:-1])
    assert training.episodes.lengths
    assert max(training.episodes.lengths) <= (STEPS if "ALE/" in training.args.env_id else LIMIT)
    assert rollout.dones.sum() == len(training.episodes.lengths)


def test_rows_travel_as_bytes_and_arrive_bit_for_bit(training):
    template = Batch.zeros(0, training.agent)
    packed = training.batch.pack()
    assert packed.shape == (STEPS * ENVS, sum(template.field_bytes))
    for sent, received in zip(training.batch, template.unpack(packed), strict=True):
        assert (received.shape, received.dtype) == (sent.shape, sent.dtype)
        assert torch.equal(received.contiguous().view(torch.uint8), sent.contiguous().view(torch.uint8))


def test_the_loss_is_finite_the_policy_is_still_the_one_that_acted_and_gradients_reach_every_weight(training):
    agent = training.agent
    losses = ppo_loss(agent, training.batch, STEPS * ENVS, training.args)
    agent.zero_grad()
    losses.loss.backward()
    assert torch.stack(losses).isfinite().all()
    assert losses.approx_kl < 1e-6
    assert losses.clip_fraction == 0
    assert losses.entropy_loss < 0
    gradients = {name: parameter.grad for name, parameter in agent.named_parameters()}
    assert [name for name, gradient in gradients.items() if not (gradient.isfinite().all() and gradient.any())] == []


def test_a_gradient_step_makes_the_loss_smaller(training):
    torch.manual_seed(1)
    agent = Agent(training.observation_space, training.action_space, training.args)
    agent.load_state_dict(training.agent.state_dict())
    optimizer = torch.optim.SGD(agent.parameters(), lr=1e-5)
    before = ppo_loss(agent, training.batch, STEPS * ENVS, training.args).loss
    before.backward()
    optimizer.step()
    assert ppo_loss(agent, training.batch, STEPS * ENVS, training.args).loss < before


@pytest.mark.parametrize("name", ["PictureAndVector-v0", "Grid-v0", "Switches-v0", "Motors-v0"])
def test_what_the_learner_keeps_of_a_step_is_what_the_environment_showed_and_received(name):
    run = Training(f"tests.spaces_env:{name}")
    for index, env in enumerate(run.envs.unwrapped.envs):
        scripted = env.unwrapped
        shown = [gym.spaces.flatten(scripted.observation_space, observation) for observation in scripted.shown]
        # Episodes of 5 steps show 6 observations, the last of which is not acted on.
        acted_on = [observation for k, observation in enumerate(shown) if k % 6 < 5][:STEPS]
        np.testing.assert_array_equal(run.rollout.raw_observations[:, index], acted_on)
        kept = run.rollout.actions[:, index].double().numpy()
        by_hand = {
            "PictureAndVector-v0": lambda a: a,
            "Grid-v0": lambda a: a.reshape(-1, *GRID.shape) + GRID.start,
            "Switches-v0": lambda a: a.reshape(-1, *SWITCHES.shape),
            "Motors-v0": lambda a: np.clip(a, MOTORS.low, MOTORS.high),
        }[name](kept)
        np.testing.assert_array_equal(scripted.received, by_hand)


def test_the_value_at_a_time_limit_is_that_of_the_picture_and_the_vector_shown_last():
    run = Training("tests.spaces_env:PictureAndVector-v0")
    shown = run.envs.unwrapped.envs[0].unwrapped.shown
    last = torch.from_numpy(gym.spaces.flatten(PICTURE_AND_VECTOR, shown[5])).float()
    assert run.rollout.dones[:, 0].nonzero().flatten().tolist() == [4, 9]
    assert run.rollout.next_values[4, 0] == pytest.approx(run.agent.value(last).item(), rel=1e-5)
    assert run.rollout.next_values[4, 0] != pytest.approx(run.rollout.values[5, 0].item(), rel=1e-2)
