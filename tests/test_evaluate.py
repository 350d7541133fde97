from functools import partial
from itertools import chain

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl.args import CommonArgs
from rl.environments import evaluation
from rl.environments.evaluation import evaluate
from rl.environments.making import read_spaces
from rl.ppo.agent import Agent
from rl.seeding import Purpose, stream_seed
from tests.scripted_env import SCRIPT

SCRIPTED = "tests.scripted_env:ScriptedBySeed-v0"


def make_agent(env_id, seed=0):
    torch.manual_seed(seed)
    args = CommonArgs(env_id=env_id)
    return Agent(*read_spaces(args), args)


def slow_return(agent, seed):
    """One greedy episode of CartPole, without a vector of environments."""
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    episode_return, ended = 0.0, False
    while not ended:
        action = agent.act_greedily(torch.from_numpy(observation)).item()
        observation, reward, terminated, truncated, _ = env.step(action)
        episode_return += reward
        ended = terminated or truncated
    return episode_return


def test_the_returns_are_those_of_the_first_episode_of_every_environment_short_or_long():
    returns = evaluate(make_agent(SCRIPTED), CommonArgs(env_id=SCRIPTED), episodes=12, seed=7).returns
    starts = [stream_seed(7, Purpose.TEST, index) % len(SCRIPT) for index in range(12)]
    assert set(starts) == {0, 1, 2, 3}  # episodes of 3, 2, 1 and 4 steps
    assert returns.dtype == np.float64
    assert returns.tolist() == [[6, 9, 6, 34][start] for start in starts]


@pytest.mark.parametrize("episodes", [1, 5])
def test_the_returns_of_greedy_episodes_equal_those_of_a_plain_loop(episodes):
    agent = make_agent("CartPole-v1", seed=3)
    expected = [slow_return(agent, stream_seed(7, Purpose.TEST, index)) for index in range(episodes)]
    assert episodes == 1 or len(set(expected)) > 1
    assert evaluate(agent, CommonArgs(), episodes, seed=7).returns.tolist() == expected


def test_the_episodes_are_the_same_if_they_run_one_by_one_to_be_recorded(monkeypatch, tmp_path):
    recorded = []
    monkeypatch.setattr(evaluation, "record_first_episode", lambda *to: recorded.append(to) or (lambda env: env))
    agent = make_agent("CartPole-v1", seed=3)
    one_by_one = evaluate(agent, CommonArgs(), 4, seed=7, video_folder=tmp_path).returns
    assert one_by_one.tolist() == evaluate(agent, CommonArgs(), 4, seed=7).returns.tolist()
    assert recorded == [(tmp_path, f"test-{index}") for index in range(4)]  # no name twice


def test_another_seed_gives_other_episodes():
    agent = make_agent("CartPole-v1", seed=3)
    assert (
        evaluate(agent, CommonArgs(), 5, seed=7).returns.tolist()
        != evaluate(agent, CommonArgs(), 5, seed=8).returns.tolist()
    )


def test_shares_of_the_episodes_are_those_that_one_process_would_play_and_of_other_seeds_than_the_test():
    agent = make_agent("CartPole-v1", seed=3)
    play = partial(evaluate, agent, CommonArgs(), seed=7, purpose=Purpose.EVALUATION)
    whole, *shares = (play(episodes=n, first=first).returns.tolist() for n, first in ((5, 0), (3, 0), (2, 3), (0, 5)))
    assert whole == [*chain(*shares)]
    assert whole != evaluate(agent, CommonArgs(), 5, seed=7).returns.tolist()


def test_evaluation_leaves_torchs_random_numbers_and_the_agent_alone():
    agent = make_agent(SCRIPTED)
    weights, state = [parameter.clone() for parameter in agent.parameters()], torch.get_rng_state()
    evaluate(agent, CommonArgs(env_id=SCRIPTED), 2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), weights, strict=True))
