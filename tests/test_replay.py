"""Environments are put back exactly: what they do next is what they would have done."""

import gymnasium as gym
import numpy as np
import pytest

from rl.args import CommonArgs
from rl.envs import make_envs, reset_envs

ENVIRONMENTS = {
    "CartPole-v1": 150,
    "LunarLander-v3": 300,
    "LunarLanderContinuous-v3": 300,
    "BipedalWalker-v3": 300,
    "Pendulum-v1": 450,
    "Taxi-v4": 450,
    "Blackjack-v1": 50,
    "CarRacing-v3": 40,
}


def make(env_id, num_envs=2):
    short = ("max_episode_steps=30",) if env_id == "CarRacing-v3" else ()
    return make_envs(CommonArgs(env_id=env_id, env_kwargs=short), num_envs)


def assert_same_steps(envs, others, num_steps):
    for _ in range(num_steps):
        actions = envs.action_space.sample()
        *step, info = envs.step(actions)
        *other_step, other_info = others.step(actions)
        for array, other in zip(step, other_step, strict=True):
            np.testing.assert_array_equal(array, other)
        assert ("episode" in info) == ("episode" in other_info)
        if "episode" in info:
            for statistic in ("r", "l"):
                np.testing.assert_array_equal(info["episode"][statistic], other_info["episode"][statistic])


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_environments_that_are_put_back_go_on_as_they_would_have(env_id):
    envs = make(env_id)
    envs.action_space.seed(0)
    observations = reset_envs(envs, seed=1, first_index=0)
    for _ in range(ENVIRONMENTS[env_id]):
        observations, *_ = envs.step(envs.action_space.sample())
    observations = observations.copy()
    others = make(env_id)
    np.testing.assert_array_equal(others.restore(envs.state(observations)), observations)
    assert_same_steps(envs, others, ENVIRONMENTS[env_id])


def test_environments_can_be_put_back_again_after_they_were(tmp_path):
    envs = make("LunarLander-v3")
    envs.action_space.seed(0)
    observations = reset_envs(envs, seed=1, first_index=0)
    for _ in range(3):
        for _ in range(50):
            observations, *_ = envs.step(envs.action_space.sample())
        state = envs.state(observations.copy())
        others = make("LunarLander-v3")
        others.restore(state)
        for own, other in zip(state, others.state(observations), strict=True):
            np.testing.assert_array_equal(own["actions"], other["actions"])
            assert own["start"] == other["start"]
        envs = others


def test_a_state_holds_the_actions_of_the_running_episodes_alone():
    envs = make("CartPole-v1", num_envs=3)
    observations = reset_envs(envs, seed=1, first_index=0)
    lengths = np.zeros(3, dtype=int)
    for _ in range(3000):
        observations, _, terminations, _, _ = envs.step(np.ones(3, dtype=np.int64))
        lengths = np.where(terminations, 0, lengths + 1)
    assert [len(state["actions"]) for state in envs.state(observations)] == lengths.tolist()
    assert len(envs.actions) < 1100  # older ones are dropped


class Restless(gym.Env):
    """Its randomness is not that of `np_random`, so no replay can repeat it."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    entropy = np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.entropy.random(1, dtype=np.float32), {}

    def step(self, action):
        return self.entropy.random(1, dtype=np.float32), 0.0, False, False, {}


gym.register("Restless-v0", Restless)


def test_an_environment_that_does_not_repeat_itself_is_refused():
    envs = make("Restless-v0")
    observations = reset_envs(envs, seed=1, first_index=0).copy()
    with pytest.raises(ValueError, match="environment 0 does not repeat its episode"):
        make("Restless-v0").restore(envs.state(observations))
