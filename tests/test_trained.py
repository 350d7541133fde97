"""A trained agent acts as the evaluation has it act."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl.args import TorchArgs
from rl.environments.collector import Collector
from rl.environments.evaluation import evaluate
from rl.ppo.agent import Agent
from rl.ppo.prepare import prepare_batch
from rl.run import checkpoints
from rl.run.checkpoints import Checkpoints
from rl.run.ending import Ending
from rl.seeding import Purpose, stream_seed
from rl.trained import TrainedAgent

ROOT = Path(__file__).parents[1]


def trained(folder, monkeypatch, **flags):
    """The folder of a run of one update, in which nothing was learnt but the statistics."""
    monkeypatch.setattr(checkpoints, "ending", Ending())
    args = TorchArgs(num_steps=64, total_timesteps=64, **flags)
    collector = Collector(args, 0, 1)
    torch.manual_seed(1)
    agent = Agent(collector.observation_space, collector.action_space, args)
    prepare_batch(collector.collect(agent, 1)[0], agent, args)
    optimizer = torch.optim.Adam(agent.parameters())
    Checkpoints(folder, args, None).add(1, agent.state_dict(), optimizer, {}, collector)
    return agent, args


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Taxi-v4", "Blackjack-v1"])
def test_an_episode_of_its_greedy_actions_has_the_return_of_the_evaluation(env_id, tmp_path, monkeypatch):
    agent, args = trained(tmp_path, monkeypatch, env_id=env_id, normalize_observations=env_id == "Pendulum-v1")
    expected = evaluate(agent, args, 1, seed=3).returns[0]
    env, actor = gym.make(env_id), TrainedAgent(str(tmp_path))
    observation, _ = env.reset(seed=stream_seed(3, Purpose.TEST, 0))
    episode_return, ended = 0.0, False
    while not ended:
        action = actor.act(observation)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        episode_return += reward
        ended = terminated or truncated
    assert episode_return == pytest.approx(expected, rel=1e-6)


def test_the_notebook_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    trained(tmp_path / "logs" / "torch_logs" / "RUN", monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads((ROOT / "docs" / "trained_agent.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    episode_return, _ = capsys.readouterr().out.splitlines()
    assert float(episode_return) == names["episode_return"] >= 8
    assert len(names["actions"]) == len(names["values"]) == 1000


def test_a_batch_of_observations_gives_the_action_of_each(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, env_id="Pendulum-v1")
    observations = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    actor = TrainedAgent(tmp_path)
    actions = actor.act(observations)
    assert actions.shape == (5, 1)
    np.testing.assert_allclose(actions, [actor.act(row) for row in observations], rtol=1e-5, atol=1e-6)


def test_sampled_actions_follow_their_seed(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, env_id="CartPole-v1")
    observations = np.zeros((200, 4), np.float32)
    one, same, other = (TrainedAgent(tmp_path, seed).act(observations, deterministic=False) for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    assert set(one.tolist()) == {0, 1}


def test_an_observation_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch)
    for wrong in (np.zeros(3), np.zeros((2, 3)), np.zeros((2, 2, 4))):
        with pytest.raises(ValueError, match=r"^observations of shape"):
            TrainedAgent(tmp_path).act(wrong)
    with pytest.raises(ValueError, match="holds no checkpoints"):
        TrainedAgent(tmp_path.parent)


@pytest.mark.parametrize("wrong", [500, "left", [1, 2]])
def test_an_observation_that_is_none_of_a_space_without_a_shape_is_refused(wrong, tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, env_id="Taxi-v4")
    with pytest.raises(ValueError, match=r"is none of Discrete\(500\)$"):
        TrainedAgent(tmp_path).act(wrong)


@pytest.mark.parametrize("wrong", [(1, 2), (1, 2, 3), (99, 2, 1), None])
def test_an_observation_that_is_none_of_a_tuple_is_refused(wrong, tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, env_id="Blackjack-v1")
    with pytest.raises(ValueError, match=r"is none of Tuple\(Discrete"):
        TrainedAgent(tmp_path).act(wrong)
