"""Presets are flags like others: they set defaults, and what is given beside them wins."""

import re

import gymnasium as gym
import pytest

from rl.args import DecoupledArgs, FabricArgs, TorchArgs
from rl.presets import PRESETS
from rl.run.command_line import parse


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the log folder is made there


def test_a_preset_sets_its_flags_and_leaves_the_others():
    args = parse(TorchArgs, ["--preset", "lunar-lander"])
    assert (args.env_id, args.num_steps, args.per_rank_batch_size) == ("LunarLander-v3", 2048, 128)
    assert args.update_epochs == TorchArgs().update_epochs


@pytest.mark.parametrize("argv", [["--preset=pendulum", "--gamma=0.5"], ["--gamma", "0.5", "--preset", "pendulum"]])
def test_a_flag_beside_a_preset_wins_wherever_it_stands(argv):
    args = parse(FabricArgs, argv)
    assert (args.env_id, args.gamma, args.normalize_rewards) == ("Pendulum-v1", 0.5, True)


def test_a_flag_equal_to_the_scripts_default_wins_over_a_preset_too():
    default = TorchArgs().total_timesteps
    assert PRESETS["lunar-lander"].flags["total_timesteps"] != default
    assert parse(TorchArgs, ["--preset", "lunar-lander", "--total-timesteps", str(default)]).total_timesteps == default


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_whole_updates_in_one_process_and_says_what_it_reaches(name, capsys):
    env_id = PRESETS[name].flags["env_id"]
    if env_id.startswith("ALE/"):
        pytest.importorskip("ale_py", reason="Atari is optional: requirements-atari.txt")
    elif env_id.startswith("MinAtar/"):
        pytest.importorskip("minatar", reason="MinAtar is optional: requirements-minatar.txt")
    elif "mujoco" in str(gym.spec(env_id).entry_point):
        pytest.importorskip("mujoco", reason="MuJoCo is optional: requirements-mujoco.txt")
    args = parse(TorchArgs, ["--preset", name])
    assert args.num_steps % args.num_envs == 0
    assert args.num_updates >= 10
    assert PRESETS[name].result in capsys.readouterr().err
    assert "return" in PRESETS[name].result


def test_a_preset_that_does_not_exist_ends_with_one_line_that_names_the_nearest_and_all(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(DecoupledArgs, ["--preset", "lunar-landr"])
    assert ended.value.code == 1
    names = ", ".join(sorted(PRESETS))
    line = f"error: there is no preset 'lunar-landr': perhaps lunar-lander? There are {names}\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("name", ["x", ""])
def test_a_preset_like_no_other_ends_with_the_names_of_those_that_there_are(capsys, name):
    with pytest.raises(SystemExit):
        parse(TorchArgs, [f"--preset={name}"])
    assert capsys.readouterr().err.startswith(f"error: there is no preset {name!r}. There are acrobot, ant, atari, ")


def test_help_shows_the_presets_in_order(capsys):
    with pytest.raises(SystemExit):
        parse(TorchArgs, ["--help"])
    words = "".join(re.findall(r"[\w{},-]", capsys.readouterr().out))
    assert f"--preset{{{','.join(sorted(PRESETS))}}}" in words
