from math import exp, log

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rl.args import CommonArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.batch import Rollout
from rl.ppo.distributions import draw_action_noise
from tests.scripted_env import SCRIPT, Episode

OTHER_SCRIPT = (Episode((0.5, 0.25), "truncated"), Episode((16.0, 32.0, 64.0, 128.0, 256.0), "terminated"))


def value(episode, step):
    """What the agent of these tests holds for V, exact in float32."""
    return 10 * episode + step + 5


@pytest.fixture
def agent():
    """V(episode, step) is as above, and the logits are (0, step - 1)."""
    agent = Agent(Box(0, np.inf, (2,)), Discrete(2), CommonArgs())
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.zero_()
        agent.critic[0].weight[0] = torch.tensor([10.0, 1.0])
        agent.critic[2].weight[0, 0] = agent.critic[4].weight[0, 0] = 1.0
        agent.critic[4].bias[0] = 5.0
        agent.actor[0].weight[0] = torch.tensor([0.0, 1.0])
        agent.actor[2].weight[0, 0] = agent.actor[4].weight[1, 0] = 1.0
        agent.actor[4].bias[1] = -1.0
    return agent


def start(*scripts, env_id="tests.scripted_env:Scripted-v0"):
    envs = make_envs(CommonArgs(env_id=env_id), len(scripts))
    envs.unwrapped.set_attr("script", scripts)
    return envs, reset_envs(envs, seed=0, first_index=0)


def no_noise(num_steps, num_envs):
    return torch.zeros(num_steps, num_envs, 2)


def expected_steps(script, num_steps):
    """The rows of one environment, as a plain loop over its script: (observation, reward, done, next value)."""
    steps = []
    for episode in range(num_steps):
        rewards, end = script[episode % len(script)]
        for step, reward in enumerate(rewards):
            done = step == len(rewards) - 1
            terminated = done and end != "truncated"
            steps.append(([episode, step], reward, done, 0 if terminated else value(episode, step + 1)))
    return steps[:num_steps]


def assert_holds(rollout, scripts):
    """Every number of the rollout is as the scripts say."""
    for n, script in enumerate(scripts):
        observations, rewards, dones, next_values = zip(*expected_steps(script, len(rollout.rewards)), strict=True)
        assert rollout.observations[:, n].tolist() == list(observations)
        assert rollout.rewards[:, n].tolist() == list(rewards)
        assert rollout.dones[:, n].tolist() == list(dones)
        assert rollout.values[:, n].tolist() == [value(*observation) for observation in observations]
        assert rollout.next_values[:, n].tolist() == list(next_values)


@pytest.mark.parametrize("num_steps", range(1, 16))
def test_a_rollout_of_any_length_holds_exactly_the_steps_of_the_scripts(agent, num_steps):
    envs, observations = start(SCRIPT, OTHER_SCRIPT)
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(num_steps, 2))
    assert_holds(rollout, [SCRIPT, OTHER_SCRIPT])


def test_shapes_and_types_are_those_that_the_rollout_declares(agent):
    envs, observations = start(SCRIPT, SCRIPT, SCRIPT)
    rollout, observations, _ = collect_rollout(agent, envs, observations, no_noise(7, 3))
    assert rollout.observations.shape == rollout.raw_observations.shape == (7, 3, 2)
    fields = rollout._asdict()
    assert fields.pop("reward_sums") is None  # the collector adds them
    assert all(field.shape == (7, 3) for name, field in fields.items() if "observations" not in name)
    types = {name: field.dtype for name, field in fields.items()}
    assert types == dict.fromkeys(fields, torch.float32) | {"actions": torch.int64, "dones": torch.bool}
    assert not any(field.requires_grad for field in fields.values())
    assert observations.shape == (3, 2)


def test_the_step_after_an_episodes_end_is_the_first_of_the_next_episode_and_nothing_lies_between(agent):
    envs, observations = start(SCRIPT)
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(6, 1))
    assert rollout.observations[:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]
    assert rollout.rewards[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert rollout.dones[:, 0].tolist() == [False, False, True, False, True, True]


def test_a_terminated_episode_has_no_value_after_its_end(agent):
    envs, observations = start((Episode((1.0, 1.0), "terminated"),))
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(4, 1))
    assert rollout.next_values[:, 0].tolist() == [value(0, 1), 0, value(1, 1), 0]


def test_an_episode_cut_by_the_time_limit_is_bootstrapped_with_its_final_observation(agent):
    envs, observations = start((Episode((1.0, 1.0), "truncated"),))
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(4, 1))
    assert rollout.next_values[:, 0].tolist() == [value(0, 1), value(0, 2), value(1, 1), value(1, 2)]


def test_an_episode_that_terminates_in_its_last_allowed_step_has_no_value_after_its_end(agent):
    envs, observations = start((Episode((1.0, 1.0), "both"),))
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(2, 1))
    assert rollout.next_values[:, 0].tolist() == [value(0, 1), 0]


def test_the_last_step_of_a_rollout_looks_at_the_observation_after_it(agent):
    envs, observations = start(SCRIPT)
    rollout, observations, _ = collect_rollout(agent, envs, observations, no_noise(2, 1))
    assert observations.tolist() == [[0, 2]]
    assert rollout.next_values[-1].tolist() == [value(0, 2)]


def test_a_rollout_that_ends_with_a_cut_episode_goes_on_from_the_next_one(agent):
    envs, observations = start(OTHER_SCRIPT)
    rollout, observations, _ = collect_rollout(agent, envs, observations, no_noise(2, 1))
    assert observations.tolist() == [[1, 0]]
    assert rollout.next_values[-1].tolist() == [value(0, 2)]


def test_an_episode_may_span_rollouts(agent):
    envs, observations = start(SCRIPT, OTHER_SCRIPT)
    rollouts, ended = [], []
    for num_steps in (2, 1, 4, 5):
        rollout, observations, episodes = collect_rollout(agent, envs, observations, no_noise(num_steps, 2))
        rollouts.append(rollout[:-1])
        ended.append((episodes.returns, episodes.lengths))
    assert_holds(Rollout(*map(torch.cat, zip(*rollouts, strict=True))), [SCRIPT, OTHER_SCRIPT])
    assert ended == [
        ([0.75], [2]),
        ([6.0], [3]),
        ([9.0, 6.0, 496.0], [2, 1, 5]),
        ([0.75, 34.0], [2, 4]),
    ]


def test_a_rollout_keeps_its_numbers_while_the_environments_go_on(agent):
    envs, observations = start(SCRIPT)
    first, observations, _ = collect_rollout(agent, envs, observations, no_noise(4, 1))
    kept = observations.copy()
    collect_rollout(agent, envs, observations, no_noise(4, 1))
    assert_holds(first, [SCRIPT])
    assert observations.tolist() == kept.tolist()


def test_the_environments_receive_the_actions_of_the_rollout(agent):
    envs, observations = start(SCRIPT, OTHER_SCRIPT)
    noise = torch.zeros(6, 2, 2)
    noise[:3, 0, 1] = noise[3:, 1, 1] = 100.0  # decides for action 1
    noise[3:, 0, 0] = noise[:3, 1, 0] = 100.0  # decides for action 0
    rollout, _, _ = collect_rollout(agent, envs, observations, noise)
    assert rollout.actions.T.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert list(envs.unwrapped.get_attr("received")) == rollout.actions.T.tolist()


def test_actions_follow_from_the_observation_at_the_time(agent):
    envs, observations = start((Episode((1.0,) * 4, "terminated"),))
    rollout, _, _ = collect_rollout(agent, envs, observations, no_noise(8, 1))
    # logits (0, step - 1): action 1 from step 2 on; in step 1 both are equal and the first is taken
    assert rollout.actions[:, 0].tolist() == [0, 0, 1, 1] * 2


def test_log_probabilities_are_those_of_the_policy_that_acted(agent):
    envs, observations = start((Episode((1.0,) * 4, "terminated"),))
    noise = no_noise(4, 1)
    noise[2, 0, 0] = 100.0
    rollout, _, _ = collect_rollout(agent, envs, observations, noise)
    assert rollout.actions[:, 0].tolist() == [0, 0, 0, 1]
    expected = [
        log(1 / (1 + exp(-1))),  # step 0: logits (0, -1), action 0
        log(1 / 2),
        log(1 / (1 + exp(1))),
        log(exp(2) / (1 + exp(2))),  # step 3: logits (0, 2), action 1
    ]
    np.testing.assert_allclose(rollout.log_probs[:, 0], expected, rtol=1e-6)


def test_observations_and_rewards_of_any_type_arrive_as_float32(agent):
    script = (Episode((0.1, 0.2), "truncated"), Episode((0.3, 0.4), "terminated"))
    envs, observations = start(script, env_id="tests.scripted_env:ScriptedFloat64-v0")
    assert observations.dtype == np.float64
    rollout, observations, _ = collect_rollout(agent, envs, observations, no_noise(3, 1))
    expected = torch.tensor([[0.1, 0.1], [0.1, 1.1], [1.1, 0.1]], dtype=torch.float64).float()
    assert torch.equal(rollout.observations[:, 0], expected)
    assert torch.equal(rollout.rewards[:, 0], torch.tensor([0.1, 0.2, 0.3]))
    next_values = [value(0.1, 1.1), value(0.1, 2.1), value(1.1, 1.1)]
    np.testing.assert_allclose(rollout.next_values[:, 0], next_values, rtol=1e-6)
    assert observations.dtype == np.float32


def test_what_environments_experience_does_not_depend_on_how_they_are_spread_over_processes():
    args = CommonArgs(env_id="LunarLander-v3")
    torch.manual_seed(0)
    agent = Agent(*read_spaces(args), args)

    def experience(indices):
        envs = make_envs(args, len(indices))
        observations = reset_envs(envs, args.seed, indices[0])
        rollouts = []
        for update in (1, 2):
            noise = draw_action_noise(agent.distribution, 100, indices, args.seed, update)
            rollout, observations, _ = collect_rollout(agent, envs, observations, noise)
            rollouts.append(rollout)
        names = ("observations", "actions", "rewards", "dones")
        return [torch.cat([getattr(rollout, name) for rollout in rollouts]) for name in names]

    one_process = experience(range(4))
    two_processes = [torch.cat(fields, dim=1) for fields in zip(experience([0, 1]), experience([2, 3]), strict=True)]
    assert all(torch.equal(alone, spread) for alone, spread in zip(one_process, two_processes, strict=True))
