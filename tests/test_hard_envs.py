"""The environments of `tests/hard_envs.py` are as hard to put back as they claim to be."""

import gymnasium as gym
import numpy as np
import pytest

from tests.hard_envs import LONGEST, SHORTEST

EXACT = ["Float64", "SeededOnce", "SameArray"]
INEXACT = ["Unrepeatable", "UnrepeatableReward", "LivesOn"]


def make(name):
    return gym.make(f"tests.hard_envs:{name}-v0", disable_env_checker=True)  # it warns of SameArray


def play(env, seed, steps, drawn=0):
    """The observations, the rewards and the ends of episodes in so many steps after a reset."""
    actions = np.random.default_rng(drawn)
    observations, rewards, ends = [env.reset(seed=seed)[0].copy()], [], []
    length = 0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(actions.uniform(-1, 1, 1).astype(np.float32))
        length += 1
        observations.append(observation.copy())
        rewards.append(reward)
        if terminated or truncated:
            ends.append((length, terminated, truncated))
            observations.append(env.reset()[0].copy())
            length = 0
    return np.array(observations), np.array(rewards), ends


@pytest.mark.parametrize("name", EXACT + INEXACT)
def test_episodes_differ_in_length_and_end_in_both_ways(name):
    lengths, terminated, truncated = zip(*play(make(name), seed=1, steps=5000)[2], strict=True)
    assert min(lengths) >= SHORTEST and max(lengths) <= LONGEST
    assert len(set(lengths)) > 10
    assert any(terminated) and any(truncated)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_environment_repeats_all_episodes_since_a_reset_with_a_seed(name):
    first, again = (play(make(name), seed=1, steps=1000) for _ in range(2))
    other = play(make(name), seed=2, steps=1000)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_float32_does_not_hold_the_observations_of_float64():
    observations, _, _ = play(make("Float64"), seed=1, steps=100)
    assert observations.dtype == np.float64
    assert not np.any(observations[:, :2] == observations[:, :2].astype(np.float32))


def test_the_random_state_that_gymnasium_knows_says_nothing_of_what_seeded_once_draws():
    env = make("SeededOnce")
    play(env, seed=1, steps=100)
    states = []
    for _ in range(2):
        env.unwrapped.np_random = np.random.default_rng(3)
        states.append(env.reset()[0])
    assert not np.array_equal(*states)


def test_same_array_returns_one_array_only():
    env = make("SameArray")
    first, _ = env.reset(seed=1)
    before = first.copy()
    second, *_ = env.step(np.ones(1, np.float32))
    assert second is first and not np.array_equal(first, before)
    assert env.reset()[0] is first


def test_unrepeatable_observations_differ_after_the_same_seed():
    first, again = (play(make("Unrepeatable"), seed=1, steps=10) for _ in range(2))
    assert not np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_unrepeatable_rewards_differ_where_observations_repeat():
    first, again = (play(make("UnrepeatableReward"), seed=1, steps=1000) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[1], again[1])


def test_an_environment_that_lives_on_remembers_its_resets():
    env = make("LivesOn")
    first, again = (play(env, seed=1, steps=10) for _ in range(2))
    new = play(make("LivesOn"), seed=1, steps=10)
    assert np.array_equal(first[0], new[0])
    assert not np.array_equal(first[0], again[0])
    assert not np.array_equal(first[1], again[1])
