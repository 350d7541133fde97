"""Environments are put back exactly: what they do next is what they would have done."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

from rl.args import CommonArgs
from rl.environments import replay
from rl.environments.making import make_envs, reset_envs

ENVIRONMENTS = {
    "CartPole-v1": 150,
    "LunarLander-v3": 300,
    "LunarLanderContinuous-v3": 300,
    "BipedalWalker-v3": 300,
    "Pendulum-v1": 450,
    "Taxi-v4": 450,
    "Blackjack-v1": 50,
    "CarRacing-v3": 25,
    "ALE/Pong-v5": 50,  # with sticky actions, of a generator of its own
    "MinAtar/Breakout-v1": 200,
    "HalfCheetah-v5": 120,
    "Hopper-v5": 300,
}
TIME_LIMITS = {"CarRacing-v3": 20, "HalfCheetah-v5": 100}  # short, so that episodes end
OPTIONAL = {
    "ALE/Pong-v5": "ale_py",
    "MinAtar/Breakout-v1": "minatar",
    "HalfCheetah-v5": "mujoco",
    "Hopper-v5": "mujoco",
}


def make(env_id, num_envs=2):
    limit = (f"max_episode_steps={TIME_LIMITS[env_id]}",) if env_id in TIME_LIMITS else ()
    return make_envs(CommonArgs(env_id=env_id, env_kwargs=limit), num_envs)


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


def observed(envs, num_steps, seed=1, update=1):
    """Random steps from the start, and then a mark; the last observations."""
    envs.action_space.seed(0)
    observations = reset_envs(envs, seed, first_index=0)
    for _ in range(num_steps):
        observations, *_ = envs.step(envs.action_space.sample())
    envs.mark(update)
    return observations.copy()


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_environments_that_are_put_back_go_on_as_they_would_have(env_id):
    if env_id in OPTIONAL:
        pytest.importorskip(OPTIONAL[env_id])
    envs, others = make(env_id), make(env_id)
    observations = observed(envs, ENVIRONMENTS[env_id])
    restored, rewards, notes = others.restore(envs.states(1))
    np.testing.assert_array_equal(restored, observations)
    assert [sum(episode, start=0.0) for episode in rewards] == envs.episode_returns.tolist()
    assert notes == []
    assert_same_steps(envs, others, ENVIRONMENTS[env_id])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3"])
def test_environments_are_put_back_where_they_stood_at_a_mark_though_they_went_on(env_id):
    envs = make(env_id)
    observations = observed(envs, 100)
    envs.mark(2)
    ahead = [envs.step(envs.action_space.sample()) for _ in range(1500)]
    assert sum("episode" in info for *_, info in ahead) > 2
    others = make(env_id)
    np.testing.assert_array_equal(others.restore(envs.states(1))[0], observations)


def test_environments_can_be_put_back_again_after_they_were():
    envs = make("LunarLander-v3")
    observed(envs, 50)
    for update in range(2, 5):
        others = make("LunarLander-v3")
        assert others.restore(envs.states(update - 1))[2] == []
        for both in (envs, others):
            both.action_space.seed(update)
            for _ in range(60):
                both.step(both.action_space.sample())
            both.mark(update)
        for own, other in zip(envs.states(update), others.states(update), strict=True):
            np.testing.assert_array_equal(own.pop("actions"), other.pop("actions"))
            np.testing.assert_array_equal(own.pop("observation"), other.pop("observation"))
            assert own == other
        envs = others


def test_a_state_holds_the_actions_of_the_running_episodes_alone_in_the_smallest_type():
    envs = make("CartPole-v1", num_envs=3)
    reset_envs(envs, seed=1, first_index=0)
    lengths = np.zeros(3, dtype=int)
    for step in range(3000):
        _, _, terminations, _, _ = envs.step(np.ones(3, dtype=np.int64))
        lengths = np.where(terminations, 0, lengths + 1)
        if step % 100 == 99:
            envs.mark(step)
    actions = [state["actions"] for state in envs.states(2999)]
    assert [len(episode) for episode in actions] == lengths.tolist()
    assert {episode.dtype for episode in actions} == {np.dtype(np.uint8)}
    assert len(envs.actions) < 1400  # older ones are dropped


def test_an_episode_without_an_end_takes_no_more_room_than_a_bound_and_begins_anew_when_it_is_resumed(monkeypatch):
    monkeypatch.setattr(replay, "LONGEST_REPLAY", 3000)
    monkeypatch.setattr(replay, "LEAST_ROOM", 100)
    flags = CommonArgs(env_id="Pendulum-v1", env_kwargs=("max_episode_steps=1000000",))
    envs, others = make_envs(flags, 2), make_envs(flags, 2)
    observed(envs, 3000)
    assert others.restore(envs.states(1))[2] == []
    for _ in range(3001):
        envs.step(envs.action_space.sample())
    envs.mark(2)
    states = envs.states(2)
    assert [sorted(state) for state in states] == [["episode", "seed"]] * 2
    assert len(envs.actions) <= 2 * 3000
    observations, _, notes = others.restore(states)
    assert notes[0] == "environment 0 was in an episode too long to be repeated"
    assert others.episodes.tolist() == [1, 1]
    assert not np.array_equal(observations, reset_envs(envs, 1, 0))


@pytest.mark.parametrize("env_id", [f"tests.hard_envs:{name}-v0" for name in ("Float64", "SeededOnce", "SameArray")])
def test_environments_with_more_digits_a_generator_of_their_own_or_one_array_are_put_back_exactly(env_id):
    envs, others = make(env_id), make(env_id)
    observations = observed(envs, 700)
    restored, _, notes = others.restore(envs.states(1))
    np.testing.assert_array_equal(restored, observations)
    assert notes == []
    assert_same_steps(envs, others, 700)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Unrepeatable", "environment 0 does not repeat its observations"),
        ("UnrepeatableReward", "environment 0 does not repeat its rewards"),
        ("LivesOn", "environment 0 "),
    ],
)
def test_an_environment_that_does_not_repeat_itself_is_noticed_and_begins_a_new_episode(name, words):
    envs, others = make(f"tests.hard_envs:{name}-v0"), make(f"tests.hard_envs:{name}-v0")
    observed(envs, 710)
    states = envs.states(1)
    assert all(len(state["actions"]) > 0 for state in states)
    observations, rewards, notes = others.restore(states)
    assert notes[0].startswith(words)
    assert [len(episode) for episode in rewards] == [0, 0]
    assert others.episodes.tolist() == [state["episode"] + 1 for state in states]
    others.mark(1)
    assert [len(state["actions"]) for state in others.states(1)] == [0, 0]
    assert np.isfinite(observations).all()


class Counting(CartPoleEnv):
    """Counts its episodes, and nothing depends on that yet."""

    level = 0

    def reset(self, **kwargs):
        self.level += 1
        return super().reset(**kwargs)


gym.register("Counting-v0", Counting)


def test_a_number_that_lives_across_resets_is_named_and_the_episode_goes_on():
    envs, others = make("Counting-v0"), make("Counting-v0")
    observations = observed(envs, 150)
    restored, _, notes = others.restore(envs.states(1))
    np.testing.assert_array_equal(restored, observations)
    assert notes[0] == "environment 0 keeps level across episodes, which a replay cannot restore"


def test_a_final_observation_is_not_that_of_the_next_episode_where_an_environment_uses_one_array_for_all():
    envs = make("tests.hard_envs:SameArray-v0", num_envs=1)
    envs.action_space.seed(0)
    reset_envs(envs, seed=1, first_index=0)
    for _ in range(300):
        before = envs.observations.copy()
        observations, _, _, _, info = envs.step(envs.action_space.sample())
        if "final_obs" in info:
            assert not np.array_equal(info["final_obs"][0], observations[0])
            assert np.abs(info["final_obs"][0] - before[0]).max() < 0.5  # one step away
            return
    raise AssertionError("no episode ended")
