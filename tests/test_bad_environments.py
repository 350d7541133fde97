"""What an environment returns against its word ends in one line that names the environment, the step and what came."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl.args import CommonArgs
from rl.environments import making
from rl.environments.evaluation import evaluate
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.voice import RunError

ENV_ID = "Told-v0"
GOOD = np.zeros(4, dtype=np.float32)


class ToldEnv(gym.Env):
    """Returns what it is told to: `observations` and `rewards` say what is not as it should be, by step.

    The steps are counted over all episodes; an episode has 4.
    """

    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)
    observations, rewards = {}, {}  # by (environment, step), after "reset" the first observation of all
    made = 0

    def __init__(self):
        self.index, self.steps = None, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.index is None:
            self.index, ToldEnv.made = ToldEnv.made, ToldEnv.made + 1
        return self.observations.get((self.index, "reset" if self.steps == 0 else f"reset {self.steps}"), GOOD), {}

    def step(self, action):
        place = self.index, self.steps
        self.steps += 1
        return self.observations.get(place, GOOD), self.rewards.get(place, 1.0), self.steps % 4 == 0, False, {}


gym.register(ENV_ID, ToldEnv)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """The environments to be told what to return."""
    monkeypatch.setattr(ToldEnv, "made", 0)
    monkeypatch.setattr(ToldEnv, "observations", {})
    monkeypatch.setattr(ToldEnv, "rewards", {})
    making._read_spaces.cache_clear()  # a test may change them
    return ToldEnv


def roll_out(num_steps=8):
    args = CommonArgs(env_id=ENV_ID)
    envs, agent = make_envs(args, 2), Agent(*read_spaces(args), args)
    noise = draw_action_noise(agent.distribution, num_steps, range(2), seed=1, update=1)
    return collect_rollout(agent, envs, reset_envs(envs, seed=1, first_index=0), noise)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("1.0", r"the reward is '1.0', no number"),
        (b"1.0", r"the reward is b'1.0', no number"),
        (np.str_("1.0"), r"the reward is np.str_\('1.0'\), no number"),
        (np.array([1.0]), r"the reward is array\(\[1.\]\), no number"),
        (np.zeros((2, 2)), r"the reward is array\(\[\[0., 0.\], \[0., 0.\]\]\), no number"),
        (torch.ones(1), r"the reward is tensor\(\[1.\]\), no number"),
        ([1.0], r"the reward is \[1.0\], no number"),
        (None, r"the reward is None, no number"),
        (1j, r"the reward is 1j, no number"),
    ],
)
def test_a_reward_that_is_no_number_is_named_with_its_environment_and_step(told, reward, words):
    told.rewards[1, 5] = reward
    with pytest.raises(RunError, match=rf"^environment 1 failed in step 5: TypeError: {words}$"):
        roll_out()


@pytest.mark.parametrize(
    "reward", [2, True, 2.0, np.float32(2), np.int8(2), np.bool_(True), np.array(2), torch.tensor(2)]
)
def test_a_reward_may_be_a_number_of_any_type(told, reward):
    told.rewards[1, 5] = reward
    assert roll_out()[0].rewards[5].tolist() == [1.0, float(reward)]


@pytest.mark.parametrize("observation", [np.zeros(1), np.zeros(5), np.zeros((1, 4)), [0.0]])
@pytest.mark.parametrize("step", [3, 5, "reset 4"])  # step 3 ends an episode, and the reset belongs to it
def test_an_observation_of_another_shape_is_named_with_its_environment_and_step(told, observation, step):
    told.observations[1, step] = observation
    with pytest.raises(RunError) as error:
        roll_out()
    words = f"TypeError: the observation has shape {np.shape(observation)}, not (4,)"
    assert str(error.value) == f"environment 1 failed in step {3 if step == 'reset 4' else step}: {words}"


@pytest.mark.parametrize("observation", [np.zeros(1), np.zeros((4, 1)), np.zeros((1, 4)), 0.0, None])
def test_an_observation_of_another_shape_at_the_first_reset_is_named(told, observation):
    told.observations[1, "reset"] = observation
    with pytest.raises(RunError) as error:
        roll_out()
    words = f"TypeError: the observation has shape {np.shape(observation)}, not (4,)"
    assert str(error.value) == f"environment 1 failed in a reset: {words}"


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        (0.0, "TypeError: object of type 'float' has no len()"),
        (None, "TypeError: object of type 'NoneType' has no len()"),
        (np.zeros(()), "TypeError: len() of unsized object"),
        (np.zeros((4, 1)), "ValueError: could not broadcast input array from shape (4,1) into shape (4,)"),
    ],
)
def test_an_observation_that_cannot_be_taken_is_named_with_its_environment_and_step(told, observation, words):
    told.observations[1, 5] = observation
    with pytest.raises(RunError) as error:
        roll_out()
    assert str(error.value) == f"environment 1 failed in step 5: {words}"


@pytest.mark.parametrize("shape", [(40, 1, 1), (40, 40, 1), (1, 40, 3), (40, 40)])
def test_an_image_of_another_shape_is_named_too(told, monkeypatch, shape):
    monkeypatch.setattr(told, "observation_space", gym.spaces.Box(0, 255, (40, 40, 3), np.uint8))
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    told.observations.update(
        {(index, step): image for index in (0, 1) for step in ("reset", "reset 4", "reset 8", *range(8))}
    )
    assert roll_out()[0].raw_observations.shape == (8, 2, 40, 40, 3)
    told.made, told.observations[1, 5] = 0, np.zeros(shape, dtype=np.uint8)
    with pytest.raises(RunError) as error:
        roll_out()
    words = f"the observation has shape {shape}, not (40, 40, 3)"
    assert str(error.value) == f"environment 1 failed in step 5: TypeError: {words}"


def test_an_observation_may_be_a_list(told):
    told.observations[1, "reset"] = told.observations[1, 4] = [0.5] * 4
    rollout, *_ = roll_out()
    assert rollout.raw_observations[0, 1].tolist() == rollout.raw_observations[5, 1].tolist() == [0.5] * 4


def test_an_observation_that_is_no_number_is_named(told):
    told.observations[1, 5] = np.array(["a"] * 4)
    with pytest.raises(RunError, match=r"^environment 1 failed in step 5: ValueError: could not convert string"):
        roll_out()


def test_a_nan_right_after_the_reset_is_said_to_be_there(told):
    told.observations[1, "reset"] = np.array([0, np.nan, 0, 0], dtype=np.float32)
    with pytest.raises(RunError, match=r"^environment 1 returned a NaN or infinite observation after the reset: nan$"):
        roll_out()


def test_a_nan_in_the_first_step_is_said_to_be_there(told):
    told.observations[1, 0] = GOOD * np.nan
    with pytest.raises(RunError, match=r"^environment 1 returned a NaN or infinite observation in step 0: nan$"):
        roll_out()


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_a_reward_in_a_test_episode_that_is_not_finite_is_named_with_its_episode(told, reward):
    told.rewards[3, 2] = reward
    args = CommonArgs(env_id=ENV_ID)
    words = f"test episode 3 has a NaN or infinite reward in step 2: {reward}"
    with pytest.raises(RunError, match=rf"^{words}$"):
        evaluate(Agent(*read_spaces(args), args), args, 5, seed=7)


def test_a_reward_after_the_end_of_a_test_episode_does_not_matter(told):
    args = CommonArgs(env_id=ENV_ID)
    told.rewards.update({(1, 4): np.nan, (0, 3): 7.0})
    returns = evaluate(Agent(*read_spaces(args), args), args, 2, seed=7).returns
    assert returns.tolist() == [10.0, 4.0]


def test_a_test_episode_without_an_end_is_cut_where_the_run_says_so(capsys):
    args = CommonArgs(env_id=ENV_ID, max_test_steps=3)
    results = evaluate(Agent(*read_spaces(args), args), args, 2, seed=7)
    assert (results.returns.tolist(), results.lengths.tolist()) == ([3.0, 3.0], [3, 3])
    assert "2 test episodes had no end after 3 steps and count as they stood" in capsys.readouterr().err
