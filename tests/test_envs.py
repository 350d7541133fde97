from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from rl.args import CommonArgs
from rl.environments.making import (
    check_video,
    make_envs,
    read_spaces,
    record_first_episode,
    record_training,
    reset_envs,
    resolve_env_id,
)
from rl.seeding import Purpose, stream_seed


def first_observations(num_envs, first_index=0, seed=42, purpose=Purpose.ENVIRONMENT, env_id="CartPole-v1"):
    envs = make_envs(CommonArgs(env_id=env_id), num_envs)
    observations = reset_envs(envs, seed, first_index, purpose).copy()
    envs.close()
    return observations


def test_environments_of_all_ranks_start_differently():
    ranks = [first_observations(3, first_index=3 * rank) for rank in range(4)]
    assert len(np.unique(np.concatenate(ranks), axis=0)) == 12


def test_the_seed_of_an_environment_depends_on_its_index_among_all_processes_alone():
    alone = first_observations(6)
    np.testing.assert_array_equal(np.concatenate([first_observations(3, 0), first_observations(3, 3)]), alone)
    np.testing.assert_array_equal(np.concatenate([first_observations(2, 0), first_observations(4, 2)]), alone)


def test_environment_k_is_seeded_with_stream_k_of_its_purpose():
    for purpose in (Purpose.ENVIRONMENT, Purpose.TEST):
        truth = [gym.make("CartPole-v1").reset(seed=stream_seed(7, purpose, index))[0] for index in (2, 3)]
        np.testing.assert_array_equal(first_observations(2, first_index=2, seed=7, purpose=purpose), truth)


def test_environments_start_differently_for_another_seed_and_in_the_test():
    starts = [first_observations(3), first_observations(3, seed=43), first_observations(3, purpose=Purpose.TEST)]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 9


def test_later_episodes_differ_over_environments_too():
    envs = make_envs(CommonArgs(), 4)
    reset_envs(envs, 0, 0)
    starts = []
    for _ in range(60):
        observations, _, terminations, _, _ = envs.step(np.zeros(4, dtype=np.int64))
        starts.extend(observations[terminations].copy())
    assert len(starts) > 8
    assert len(np.unique(starts, axis=0)) == len(starts)


def test_the_step_that_ends_an_episode_returns_the_next_ones_first_observation_and_the_final_one_aside():
    envs = make_envs(CommonArgs(env_id="tests.scripted_env:Scripted-v0"), 1)
    reset_envs(envs, 0, 0)
    steps = [envs.step(np.zeros(1, dtype=np.int64)) for _ in range(3)]
    _, rewards, terminations, truncations, info = steps[-1]
    assert envs.step(np.zeros(1, dtype=np.int64))[0].tolist() == [[1, 1]]  # no step is lost in between
    assert (rewards.item(), terminations.item(), truncations.item()) == (3.0, True, False)
    assert info["final_obs"][0].tolist() == [0, 3]
    assert (info["episode"]["r"].item(), info["episode"]["l"].item()) == (6.0, 3)


def test_observations_of_any_shape_arrive_flat():
    env_id = "tests.scripted_env:ScriptedMatrix-v0"
    assert gym.make(env_id).observation_space.shape == (2, 1)
    assert first_observations(3, env_id=env_id).tolist() == [[0, 0]] * 3
    assert read_spaces(CommonArgs(env_id=env_id)) == (Box(0, np.inf, (2, 1), np.float32), Discrete(2))


def test_spaces_are_those_of_the_environment():
    env = gym.make("CartPole-v1")
    assert read_spaces(CommonArgs()) == (env.observation_space, env.action_space)


def test_only_the_recorded_environment_renders():
    wrapped = []
    envs = make_envs(CommonArgs(), 3, record=lambda env: wrapped.append(env) or env)
    assert [env.render_mode for env in envs.unwrapped.envs] == ["rgb_array", None, None]
    assert len(wrapped) == 1
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPol-v1", "cannot make the environment CartPol-v1: Environment `CartPol` doesn't exist"),
        ("CartPole-v9", "cannot make the environment CartPole-v9: "),
        ("no_such_package:Foo-v0", "cannot make the environment no_such_package:Foo-v0: No module named"),
        ("tests.scripted_env:Foo-v0", "cannot make the environment tests.scripted_env:Foo-v0: Environment `Foo`"),
        ("not an id", "cannot make the environment not an id: "),
        ("a:b:c", "cannot make the environment a:b:c: "),
        ("", "cannot make the environment "),
    ],
)
def test_an_environment_that_is_not_supported_is_named_in_one_line(env_id, message):
    with pytest.raises(ValueError) as error:
        read_spaces(CommonArgs(env_id=env_id))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "advice"),
    [
        ("MiniGrid-Empty-8x8-v0", "pip install minigrid, then --env-id minigrid:MiniGrid-Empty-8x8-v0"),
        ("minigrid:MiniGrid-Empty-8x8-v0", "(pip install minigrid)"),
        ("FetchReach-v4", "pip install gymnasium_robotics, then --env-id gymnasium_robotics:FetchReach-v4"),
        ("Pong-v5", "ALE/Pong-v5 (pip install -r requirements-atari.txt)"),
        ("PongNoFrameskip-v4", "ALE/Pong-v5 (pip install -r requirements-atari.txt)"),
        ("nowhere/Some-v0", "a package's environments are named module:Id (pip install minigrid, --env-id minigrid:"),
        ("my_envs:Mine-v0", "or start where my_envs can be imported"),
        ("HalfCheetah-v5", "pip install -r requirements-mujoco.txt"),
        ("MinAtar/Breakout-v1", "pip install -r requirements-minatar.txt"),
    ],
)
def test_an_environment_whose_package_is_missing_is_answered_with_what_to_install(env_id, advice):
    packages = {"MiniGrid": "minigrid", "HalfCheetah": "mujoco", "MinAtar": "minatar", "Pong": "ale_py"}
    if any(name in env_id and find_spec(package) for name, package in packages.items()):
        pytest.skip("the package is installed")
    with pytest.raises(ValueError) as error:
        read_spaces(CommonArgs(env_id=env_id))
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("env_id", ["CartPol-v1", "CartPole-v9", "tests.scripted_env:Foo-v0"])
def test_a_misspelled_environment_is_answered_without_advice_about_packages(env_id):
    with pytest.raises(ValueError) as error:
        read_spaces(CommonArgs(env_id=env_id))
    assert "pip install" not in str(error.value)


def record_an_episode(record):
    envs = make_envs(CommonArgs(), 1, record)
    reset_envs(envs, 0, 0)
    for _ in range(20):
        envs.step(np.ones(1, dtype=np.int64))
    envs.close()


@pytest.mark.parametrize("recorder", [record_training, lambda folder: record_first_episode(folder, "test-0")])
def test_a_video_of_a_run_that_is_resumed_overwrites_none_from_before(recorder, tmp_path):
    record_an_episode(recorder(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert before
    record_an_episode(recorder(tmp_path))
    assert len(list(tmp_path.glob("*.mp4"))) == 2 * len(before)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_videos_need_an_environment_that_draws_pictures():
    check_video(CommonArgs())
    with pytest.raises(ValueError, match=r"^tests.scripted_env:Scripted-v0 has no render mode rgb_array"):
        check_video(CommonArgs(env_id="tests.scripted_env:Scripted-v0"))


def test_videos_need_the_package_that_writes_them(monkeypatch):
    monkeypatch.setattr("rl.environments.making.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"^videos need the package moviepy"):
        check_video(CommonArgs())


@pytest.mark.parametrize("env_id", ["CartPole-v1", "tests.scripted_env:Scripted-v0", "CartPol-v1", "a:b:c"])
def test_an_id_that_is_not_retired_stays_as_it_is(env_id, capsys):
    assert resolve_env_id(env_id) == env_id
    assert capsys.readouterr().err == ""
