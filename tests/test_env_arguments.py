import os
from unittest import mock

import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box

from rl.args import CommonArgs, DecoupledArgs, FabricArgs, TorchArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.run.command_line import parse

CLASSES = [TorchArgs, FabricArgs, DecoupledArgs]


def arguments(*texts):
    return CommonArgs(env_kwargs=texts).env_arguments()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=9.0", 9.0),
        ("k=-5", -5),
        ("k=1e-3", 0.001),
        ("k=true", True),
        ("k=false", False),
        ("k=null", None),
        ("k=rgb_array", "rgb_array"),
        ('k="7"', "7"),
        ("k=[4, 4]", [4, 4]),
        ('k={"a": 1}', {"a": 1}),
        ("k=a=b", "a=b"),
        ("k=", ""),
        ('{"k": {"a": [1, null]}}', {"a": [1, None]}),
        ('{"k": 2.0}', 2.0),
    ],
)
def test_a_value_has_the_type_that_json_gives_it_and_is_text_otherwise(text, value):
    (key, read), *others = arguments(text).items()
    assert (key, read, type(read), others) == ("k", value, type(value), [])


@pytest.mark.parametrize(("text", "value"), [("k=False", False), ("k=True", True), ("k=None", None)])
def test_pythons_spelling_of_a_truth_value_is_no_text_which_would_count_as_true(text, value):
    assert arguments(text) == {"k": value}


def test_pairs_and_json_stand_together_and_the_later_one_counts():
    assert arguments() == {}
    assert arguments("a=1", "b=x", '{"c": 2, "a": 3}', "b=y") == {"a": 3, "b": "y", "c": 2}


@pytest.mark.parametrize("text", ["g", "[1]", "{g: 9}", '{"g": 9', "{'g': 9}", "", '{"g": 9} {"h": 1}'])
def test_what_is_neither_a_pair_nor_an_object_is_answered_by_one_line(text):
    with pytest.raises(ValueError) as error:
        CommonArgs(env_kwargs=(text,)).check()
    assert str(error.value) == f"--env-kwargs takes key=value pairs or a JSON object, got {text!r}"


@pytest.mark.parametrize("script_args", CLASSES)
def test_several_arguments_follow_the_flag(script_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LT_CLI_USED": "1"}
    with mock.patch.dict(os.environ, world | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        flags = ["--env-id", "LunarLander-v3", "--env-kwargs", "gravity=-5", '{"enable_wind": true}', "--num-envs", "2"]
        args = parse(script_args, flags)
    assert (args.env_arguments(), args.num_envs) == ({"gravity": -5, "enable_wind": True}, 2)


def test_an_argument_that_the_environment_does_not_take_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^cannot make the environment Pendulum-v1: .*\bgg\b.*$") as error:
        read_spaces(CommonArgs(env_id="Pendulum-v1", env_kwargs=("gg=9.0",)))
    assert "\n" not in str(error.value)


def test_every_pendulum_swings_with_the_gravity_that_was_asked_for():
    envs = make_envs(CommonArgs(env_id="Pendulum-v1", env_kwargs=("g=3.5",)), 3)
    before = reset_envs(envs, 0, 0).copy()
    after, *_ = envs.step(np.full((3, 1), 0.5, dtype=np.float32))
    for start, end in zip(before, after, strict=True):
        truth = PendulumEnv(g=3.5)
        truth.reset()
        truth.state = np.array([np.arctan2(start[1], start[0]), start[2]], dtype=np.float64)
        np.testing.assert_allclose(end, truth.step(np.array([0.5]))[0], rtol=1e-5, atol=1e-5)
    envs.close()


def test_the_lander_has_its_gravity_and_its_wind_also_where_it_is_recorded():
    kwargs = ("gravity=-5", "enable_wind=true", "wind_power=3.5")
    envs = make_envs(CommonArgs(env_id="LunarLander-v3", env_kwargs=kwargs), 2, record=lambda env: env)
    for env, render_mode in zip(envs.unwrapped.envs, ("rgb_array", None), strict=True):
        lander = env.unwrapped
        assert (lander.gravity, lander.enable_wind, lander.wind_power) == (-5, True, 3.5)
        assert lander.render_mode == render_mode
        env.reset(seed=0)
        assert lander.world.gravity.y == -5
    envs.close()


def test_an_argument_that_changes_the_spaces_changes_those_that_the_agent_is_made_for():
    _, action_space = read_spaces(CommonArgs(env_id="LunarLander-v3", env_kwargs=("continuous=true",)))
    assert action_space == Box(-1, 1, (2,), np.float32)


def test_the_time_limit_is_an_argument_too():
    envs = make_envs(CommonArgs(env_id="Pendulum-v1", env_kwargs=("max_episode_steps=3",)), 1)
    reset_envs(envs, 0, 0)
    assert [envs.step(np.zeros((1, 1), dtype=np.float32))[3].item() for _ in range(6)] == [False, False, True] * 2
