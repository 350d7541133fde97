"""What acts in a rollout, in NumPy, does what the agent does in PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn

from rl.args import CommonArgs
from rl.environments.making import read_spaces
from rl.fast.policy import make_policy
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.distributions import draw_action_noise
from rl.ppo.normalize import moments


@pytest.mark.parametrize("flags", [{}, {"activation_function": "tanh", "hidden_sizes": (5,)}, {"hidden_sizes": ()}])
@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "LunarLanderContinuous-v3", "tests.spaces_env:Grid-v0", "CarRacing-v3"]
)
def test_it_acts_as_the_agent_does_after_normalisation(env_id, flags):
    args = CommonArgs(env_id=env_id, normalize_observations=env_id != "CarRacing-v3", **flags)
    torch.manual_seed(0)
    agent = Agent(*read_spaces(args), args)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    observations = Batch.zeros(6, agent).observations
    observations += (3 * torch.randn(observations.shape)).abs().to(observations.dtype)
    if args.normalize_observations:
        agent.observation_normalizer.update(moments(observations[None] + 0.5))
    noise = draw_action_noise(agent.distribution, 1, range(6), seed=0, update=1)[0]
    with torch.no_grad():
        truth = agent.act(agent.observation_normalizer(observations), noise)
    actions = torch.from_numpy(make_policy(agent, observations.numpy())(observations.numpy(), noise.numpy()))
    assert len(truth.unique()) > 1
    torch.testing.assert_close(actions, truth, rtol=1e-5, atol=1e-6)


def test_before_the_first_update_large_observations_reach_the_network_as_they_are():
    args = CommonArgs(env_id="LunarLanderContinuous-v3", normalize_observations=True)
    torch.manual_seed(0)
    agent = Agent(*read_spaces(args), args)
    observations, noise = 1000 * torch.randn(6, 8), torch.zeros(6, 2)
    with torch.no_grad():
        truth = agent.act(observations, noise)
        clipped = agent.act(observations.clamp(-10, 10), noise)
    actions = torch.from_numpy(make_policy(agent, observations.numpy())(observations.numpy(), noise.numpy()))
    torch.testing.assert_close(actions, truth, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(truth, clipped, rtol=0.1)


def test_it_acts_with_the_weights_of_the_moment_it_was_made():
    args = CommonArgs()
    agent = Agent(*read_spaces(args), args)
    observations, noise = np.ones((1, 4), dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
    for best in (0, 1, 0):
        agent.actor[-1].bias.data = torch.eye(2)[best] * 100
        assert make_policy(agent, observations)(observations, noise).tolist() == [best]


def with_elu(agent):
    agent.actor = nn.Sequential(*(nn.ELU() if isinstance(layer, nn.ReLU) else layer for layer in agent.actor))


def with_layer_norm(agent):
    agent.actor = nn.Sequential(agent.actor[0], nn.LayerNorm(64), *agent.actor[1:])


def without_layers(agent):
    class Half(nn.Module):
        def forward(self, features):
            return self.layers(features) / 2

    half = Half()
    half.layers, agent.actor = agent.actor, half


def with_other_features(agent):
    agent.encoder.forward = lambda observations: 2 * observations


def with_a_cooler_policy(agent):
    """What acts is edited, not what it acts with."""
    sample = agent.distribution.sample
    agent.distribution.sample = lambda outputs, noise: sample(outputs, 0.5 * noise)


EDITS = [with_elu, with_layer_norm, without_layers, with_other_features, with_a_cooler_policy]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zeros"])
def test_an_edited_agent_acts_as_it_was_edited_and_a_line_says_so(edit, env_id, zero, capsys):
    args = CommonArgs(env_id=env_id, ortho_init=True)  # without biases: zeros stay zeros in many networks
    torch.manual_seed(0)
    agent = Agent(*read_spaces(args), args)
    edit(agent)
    observations = torch.zeros(8, 4 if env_id == "CartPole-v1" else 3)
    policy = make_policy(agent, (observations if zero else torch.randn_like(observations)).numpy())
    assert capsys.readouterr().err.count("the agent acts through PyTorch, since NumPy does not calculate the same") == 1
    observations = torch.randn(500, observations.shape[1])
    noise = torch.from_numpy(agent.distribution.draw_noise(np.random.default_rng(0), 500))
    with torch.no_grad():
        truth = agent.act(observations, noise)
    np.testing.assert_array_equal(policy(observations.numpy(), noise.numpy()), truth.numpy())


def test_an_agent_as_it_is_acts_through_numpy_and_nothing_is_said(capsys):
    args = CommonArgs()
    agent = Agent(*read_spaces(args), args)
    policy = make_policy(agent, np.zeros((4, 4), dtype=np.float32))
    agent.actor = None  # PyTorch could not act any more
    assert policy(np.zeros((4, 4), dtype=np.float32), np.zeros((4, 2), dtype=np.float32)).shape == (4,)
    assert capsys.readouterr().err == ""
