"""What acts in a rollout, in NumPy, does what the agent does in PyTorch."""

import numpy as np
import pytest
import torch

from rl.agent import Agent
from rl.args import CommonArgs
from rl.distributions import draw_action_noise
from rl.envs import read_spaces
from rl.minibatch import Batch
from rl.normalize import moments
from rl.policy import make_policy


@pytest.mark.parametrize("flags", [{}, {"activation_function": "tanh", "hidden_sizes": (5,)}, {"hidden_sizes": ()}])
@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "LunarLanderContinuous-v3", "tests.spaces_env:Grid-v0", "CarRacing-v3"]
)
def test_it_acts_as_the_agent_does_after_normalisation(env_id, flags):
    args = CommonArgs(env_id=env_id, normalize_observations=env_id != "CarRacing-v3", **flags)
    torch.manual_seed(0)
    observation_space, action_space = read_spaces(args)
    agent = Agent(observation_space, action_space, args)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    observations = Batch.zeros(6, observation_space, agent.distribution).observations
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
