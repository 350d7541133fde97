"""The collector knows where its environments stand, and where the discounted sums of their rewards stand."""

import numpy as np
import pytest
import torch

from rl.args import CommonArgs
from rl.environments.collector import Collector, DiscountedSums
from rl.ppo.agent import Agent

GAMMA = 0.9


def slow_discounted_sums(rewards, dones):
    """For each environment and step the discounted sum of its episode's rewards until then, from the definition."""
    sums = np.zeros(rewards.shape)
    for env in range(rewards.shape[1]):
        start = 0
        for t in range(len(rewards)):
            sums[t, env] = sum(GAMMA ** (t - k) * rewards[k, env] for k in range(start, t + 1))
            if dones[t, env]:
                start = t + 1
    return sums


@pytest.fixture
def experience():
    """Rewards and ends of episodes, [T, N]."""
    rng = np.random.default_rng(0)
    rewards, dones = rng.normal(2, 3, (20, 3)).astype(np.float32), rng.random((20, 3)) < 0.2
    assert dones[:8].any() and dones[8:].any() and not dones[7].all()
    return rewards, dones


def test_discounted_sums_are_those_of_the_definition_over_consecutive_rollouts(experience):
    sums = DiscountedSums(np.zeros(3), GAMMA)
    rewards, dones = map(torch.from_numpy, experience)
    followed = torch.cat([sums.follow(rewards[part], dones[part]) for part in (slice(0, 8), slice(8, 20))])
    assert followed.dtype == torch.float64
    np.testing.assert_allclose(
        followed, slow_discounted_sums(experience[0].astype(np.float64), experience[1]), rtol=1e-12
    )


def test_sums_that_begin_with_the_rewards_of_the_running_episodes_stand_where_those_that_followed_them_do(experience):
    rewards, dones = experience
    sums, begun = DiscountedSums(np.zeros(3), GAMMA), DiscountedSums(np.ones(3), GAMMA)
    sums.follow(torch.from_numpy(rewards), torch.from_numpy(dones))
    starts = [max(np.flatnonzero(ends), default=-1) + 1 for ends in dones.T]
    begun.begin([episode[start:].astype(np.float64) for episode, start in zip(rewards.T, starts, strict=True)])
    assert begun.sums.tolist() == sums.sums.tolist()


def make(args, rank, world_size):
    torch.manual_seed(0)
    collector = Collector(args, rank, world_size)
    return collector, Agent(collector.observation_space, collector.action_space, args)


def collect(ranks, update):
    """What some collectors experience in a rollout, side by side."""
    rollouts = [collector.collect(agent, update)[0] for collector, agent in ranks]
    names = ("raw_observations", "actions", "rewards", "dones", "reward_sums")
    return [torch.cat([getattr(rollout, name) for rollout in rollouts], dim=1) for name in names]


def test_two_collectors_experience_together_what_one_with_all_environments_does():
    args = CommonArgs(num_envs=4, num_steps=200, normalize_rewards=True)
    halves = CommonArgs(num_envs=2, num_steps=200, normalize_rewards=True)
    alone, together = [make(args, 0, 1)], [make(halves, rank, 2) for rank in range(2)]
    for update in (1, 2):
        assert all(map(torch.equal, collect(alone, update), collect(together, update)))


def test_one_that_is_restored_goes_on_as_the_one_whose_states_it_was_given_though_there_are_fewer_processes():
    halves = CommonArgs(env_id="LunarLander-v3", num_envs=1, num_steps=200, normalize_rewards=True)
    whole = CommonArgs(env_id="LunarLander-v3", num_envs=2, num_steps=200, normalize_rewards=True)
    before = [make(halves, rank, 2) for rank in range(2)]
    collect(before, 1)
    states = [state for collector, _ in before for state in collector.states(1)]
    after = [make(whole, 0, 1)]
    assert after[0][0].restore(states) == []
    for update in (2, 3):
        assert all(map(torch.equal, collect(before, update), collect(after, update)))
    assert before[0][0].updates == [1, 2, 3] and after[0][0].updates == [2, 3]


def test_sums_of_rewards_are_left_out_where_nothing_is_normalised_with_them():
    collector, agent = make(CommonArgs(num_steps=16), 0, 1)
    assert collector.collect(agent, 1)[0].reward_sums is None
