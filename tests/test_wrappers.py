"""What the flags for games change: frames are stacked, a lost life ends an episode for the learner, FIRE starts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rl.args import CommonArgs
from rl.environments.collector import Collector
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.ppo.agent import Agent
from rl.ppo.prepare import prepare_batch
from rl.spaces import is_image
from rl.voice import RunError

LIVES, STEPS_OF_A_LIFE = 3, 4


class Game(gym.Env):
    """Counts its steps; every fourth costs a life, the last one ends it. Its rewards are the numbers of the steps."""

    def __init__(self, shape=(8, 9, 2)):
        self.observation_space, self.action_space = Box(0, 255, shape, np.uint8), Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.see(), {"lives": LIVES}

    def step(self, action):
        self.steps += 1
        lives = LIVES - self.steps // STEPS_OF_A_LIFE
        return self.see(), float(self.steps), lives == 0, False, {"lives": lives}

    def see(self):
        places = np.arange(np.prod(self.observation_space.shape), dtype=np.uint8)
        return (places + 10 * self.steps).astype(np.uint8).reshape(self.observation_space.shape)


@pytest.fixture(autouse=True)
def game():
    gym.register("Game-v0", Game)
    yield
    del gym.registry["Game-v0"]


def collect(steps, **flags):
    args = CommonArgs(env_id="Game-v0", num_envs=1, num_steps=steps, **flags)
    collector = Collector(args, 0, 1)
    agent = Agent(collector.observation_space, collector.action_space, args)
    return (*collector.collect(agent, 1), agent, args)


def test_a_lost_life_ends_an_episode_for_the_learner_and_the_return_is_that_of_the_whole_game():
    rollout, episodes, _, _ = collect(26, terminal_on_life_loss=True)
    ends = [step for step in range(26) if rollout.dones[step]]
    assert ends == [3, 7, 11, 15, 19, 23]
    assert not rollout.next_values[ends].any()
    assert (episodes.returns, episodes.lengths) == ([78.0, 78.0], [12, 12])


def test_without_the_flag_only_the_last_life_does():
    rollout, episodes, _, _ = collect(26)
    assert rollout.dones.nonzero()[:, 0].tolist() == [11, 23]
    assert episodes.lengths == [12, 12]


def test_an_environment_without_lives_is_refused_in_one_line():
    args = CommonArgs(env_id="CartPole-v1", terminal_on_life_loss=True)
    with pytest.raises(RunError, match=r"^environment 0 failed in a reset: .*--terminal-on-life-loss is for"):
        Collector(args, 0, 1)


def test_clipped_rewards_are_their_signs_in_what_is_learnt_alone():
    rollout, episodes, agent, args = collect(12, clip_rewards=True, gamma=0.0, normalize_advantages=False)
    batch = prepare_batch(rollout._replace(rewards=torch.tensor([[-2.0], [0.0], [7.0]] * 4)), agent, args)
    torch.testing.assert_close(batch.returns, torch.tensor([-1.0, 0.0, 1.0] * 4), rtol=0, atol=1e-6)
    assert episodes.returns == [78.0]


@pytest.mark.parametrize("shape", [(8, 9, 2), (2, 8, 9)])
def test_stacked_frames_stand_side_by_side_along_the_axis_of_channels(shape):
    args = CommonArgs(env_id="Game-v0", env_kwargs=(f'{{"shape": {list(shape)}}}',), frame_stack=3)
    axis = -1 if shape[-1] == 2 else 0
    stacked = tuple(6 if size == 2 else size for size in shape)
    assert read_spaces(args)[0] == Box(0, 255, stacked, np.uint8)
    envs, game = make_envs(args, 1), Game(shape)
    frames = [game.reset()[0]] * 3
    np.testing.assert_array_equal(reset_envs(envs, 0, 0)[0], np.concatenate(frames, axis))
    for _ in range(5):
        frames = [*frames[1:], game.step(0)[0]]
        np.testing.assert_array_equal(envs.step(np.zeros(1, np.int64))[0][0], np.concatenate(frames, axis))


def test_stacked_vectors_are_flat():
    args = CommonArgs(env_id="CartPole-v1", frame_stack=3)
    observations = reset_envs(make_envs(args, 1), 0, 0)
    assert observations.shape == (1, 12)
    assert observations[0].tolist() == [*observations[0, :4]] * 3


@pytest.mark.parametrize(("game_id", "presses"), [("ALE/Breakout-v5", True), ("ALE/MsPacman-v5", False)])
def test_fire_is_pressed_when_a_life_begins_in_games_that_wait_for_it(game_id, presses):
    pytest.importorskip("ale_py", reason="Atari is optional: requirements-atari.txt")
    pytest.importorskip("cv2", reason="Atari is optional: requirements-atari.txt")
    envs = make_envs(CommonArgs(env_id=game_id, env_kwargs=("repeat_action_probability=0",)), 1)
    actions = []
    game = envs.envs[0].unwrapped
    step = game.step
    game.step = lambda action: actions.append(int(action)) or step(action)
    reset_envs(envs, 0, 0)
    assert (actions[-4:] == [1] * 4) is presses
    lives, action = game.ale.lives(), next(a for a in range(2, 4))
    del actions[:]
    for _ in range(1500):
        envs.step(np.array([action]))
        if game.ale.lives() < lives:
            break
    assert game.ale.lives() == lives - 1
    assert (1 in actions) is presses


@pytest.mark.parametrize(
    "flags",
    [
        {"clip_rewards": True, "normalize_rewards": True},
        {"terminal_on_life_loss": True, "normalize_rewards": True},
        {"env_backend": "envpool", "frame_stack": 2},
        {"env_backend": "envpool", "wrappers": ("a:B",)},
        {"wrappers": ("no_function",)},
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags):
    with pytest.raises(ValueError, match=r"^--"):
        CommonArgs(**flags)


def sees_double(env):
    return gym.wrappers.TransformObservation(env, lambda image: 2 * image, env.observation_space)


def test_wrappers_by_name_are_put_around_the_environment_in_their_order_and_inside_the_stack_of_frames():
    names = (f"{__name__}:sees_double", "gymnasium.wrappers:FlattenObservation")
    args = CommonArgs(env_id="Game-v0", wrappers=names, frame_stack=2)
    assert read_spaces(args)[0].shape == (2, 144)
    assert read_spaces(CommonArgs(env_id="Game-v0"))[0].shape == (8, 9, 2)
    observations = reset_envs(make_envs(args, 1), 1, 0)
    assert np.array_equal(observations[0, :144], 2 * np.arange(144, dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_module:Wrapper", "No module named 'no_module'"),
        ("gymnasium.wrappers:NoWrapper", "module 'gymnasium.wrappers' has no attribute 'NoWrapper'"),
        ("gymnasium.wrappers:ClipReward", "`min_reward` and `max_reward` cannot be None"),
        ("builtins:repr", "--wrappers builtins:repr gave no environment, but '<Order"),
    ],
)
def test_a_wrapper_that_cannot_be_put_around_the_environment_is_named_in_one_line(name, reason):
    with pytest.raises(ValueError, match="cannot make the environment Game-v0: ") as caught:
        read_spaces(CommonArgs(env_id="Game-v0", wrappers=(name,)))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_minigrid_the_picture_alone_is_learnt_from_where_a_wrapper_says_so():
    pytest.importorskip("minigrid", reason="MiniGrid is optional: requirements-minigrid.txt")
    env_id = "minigrid:MiniGrid-Empty-5x5-v0"
    picture, _ = read_spaces(CommonArgs(env_id=env_id, wrappers=("minigrid.wrappers:ImgObsWrapper",)))
    assert is_image(picture) and picture.shape == (7, 7, 3)
    with pytest.raises(ValueError, match=r"the observation space .* is not supported"):
        read_spaces(CommonArgs(env_id=env_id))
