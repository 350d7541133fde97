import contextlib
import math
import re
import sys
from dataclasses import asdict

import pytest

from rl import voice
from rl.args import CommonArgs, DecoupledArgs, FabricArgs, TorchArgs
from rl.processes.ranks import read_ranks
from rl.run.command_line import parse

HUGE = 2**32
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def one_process_in_an_empty_folder(monkeypatch, tmp_path):
    set_ranks(monkeypatch)
    monkeypatch.chdir(tmp_path)  # the log folder is made there
    monkeypatch.setattr(voice.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("LT_CLI_USED", raising=False)


def set_ranks(monkeypatch, rank=0, world_size=1):
    numbers = rank, rank, world_size, world_size, "localhost", 0
    for name, number in zip(voice.LAUNCH_VARIABLES, numbers, strict=True):
        monkeypatch.setenv(name, str(number))


BOUNDS = {
    "num_envs": ("at least 1", [0, -3], [1]),
    "num_steps": ("at least 1", [0], [1]),
    "per_rank_batch_size": ("at least 1", [0], [1]),
    "update_epochs": ("at least 1", [0], [1]),
    "total_timesteps": ("at least 1", [0], [1]),
    "seed": ("between 0 and 2**32 - 1", [-1, HUGE], [0, HUGE - 1]),
    "gamma": ("between 0 and 1", [-0.1, 1.1, NAN], [0.0, 1.0]),
    "gae_lambda": ("between 0 and 1", [-0.1, 1.1, NAN], [0.0, 1.0]),
    "noise_correlation": ("at least 0 and below 1", [-0.1, 1.0, NAN], [0.0, 0.99]),
    "learning_rate": ("a finite number above 0", [0.0, -1.0, INF, NAN], [1e-9]),
    "clip_coef": ("a finite number above 0", [0.0, -1.0, INF, NAN], [1e-9]),
    "max_grad_norm": ("a finite number above 0", [0.0, -1.0, INF, NAN], [1e-9]),
    "ent_coef": ("a finite number of at least 0", [-0.1, INF, NAN], [0.0]),
    "vf_coef": ("a finite number of at least 0", [-0.1, INF, NAN], [0.0]),
    "exp_name": ("letters, digits, '.', '_' and '-' only", ["", "a b", "a/b", "a\n"], ["A.b_c-1"]),
    "timeout": ("above 0 and at most 1e6", [0.0, 1e300, INF, NAN], [1e-9, 1e6]),
    "test_episodes": ("at least 1", [0], [1]),
    "max_test_steps": ("at least 1", [0], [1]),
    "checkpoint_every": ("at least 1", [0], [1]),
    "keep_checkpoints": ("at least 1", [0], [1]),
    "env_threads": ("at least 1", [0], [1]),
    "hidden_sizes": ("sizes of at least 1", [(0,), (64, -1)], [(), (1,)]),
    "target_kl": ("a finite number above 0", [0.0, -1.0, INF, NAN], [None, 1e-9]),
    "resume": ("a run's folder or one of its checkpoints", [""], [None, "run"]),
}


@pytest.mark.parametrize(
    ("name", "bounds", "value"), [(name, bounds, bad) for name, (bounds, bads, _) in BOUNDS.items() for bad in bads]
)
def test_a_value_out_of_bounds_is_refused_with_its_flag_and_its_bounds(name, bounds, value):
    with pytest.raises(ValueError) as error:
        CommonArgs(**{name: value})
    assert str(error.value) == f"--{name.replace('_', '-')} must be {bounds}, got {value!r}"


@pytest.mark.parametrize(("name", "value"), [(name, good) for name, (*_, goods) in BOUNDS.items() for good in goods])
def test_a_value_on_its_bound_is_accepted(name, value):
    assert getattr(CommonArgs(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["a" * 101, "é" * 51])
def test_a_name_of_an_experiment_that_fits_into_no_file_name_is_refused(name):
    assert CommonArgs(exp_name="a" * 100).exp_name
    with pytest.raises(ValueError, match=r"^--exp-name must be at most 100 bytes long, got "):
        CommonArgs(exp_name=name)


def test_a_player_on_the_gpu_needs_trainers_on_the_gpu():
    with pytest.raises(ValueError, match=r"^--player-on-gpu needs --cuda"):
        DecoupledArgs(player_on_gpu=True)
    assert DecoupledArgs(player_on_gpu=True, cuda=True).player_on_gpu


def test_a_run_is_evaluated_after_every_nth_update_and_after_the_last_and_ends_at_its_aim():
    with pytest.raises(ValueError, match=r"^--stop-at needs --eval-every"):
        CommonArgs(stop_at=200)
    with pytest.raises(ValueError, match=r"^--stop-at must be a number, got nan"):
        CommonArgs(stop_at=math.nan, eval_every=1)
    args = CommonArgs(eval_every=3, stop_at=200, total_timesteps=8 * 1024)
    assert [update for update in range(1, 9) if args.evaluates_after(update)] == [3, 6, 8]
    assert [args.is_solved_by(best) for best in (None, 199.9, 200.0)] == [False, False, True]
    assert not CommonArgs().is_solved_by(1e9)
    assert not any(map(CommonArgs().evaluates_after, range(1, 200)))


def test_every_environment_takes_at_least_one_step_per_update():
    CommonArgs(num_envs=4, num_steps=12).check_processes(3)
    with pytest.raises(ValueError, match=r"^--num-steps 11 is below the number of environments, 12:"):
        CommonArgs(num_envs=4, num_steps=11).check_processes(3)


def test_only_the_player_of_the_decoupled_script_runs_environments():
    DecoupledArgs(num_envs=4, num_steps=4).check_processes(3)
    with pytest.raises(ValueError, match=r"^--num-steps 3 is below the number of environments, 4:"):
        DecoupledArgs(num_envs=4, num_steps=3).check_processes(3)


def test_a_run_without_an_update_is_refused():
    CommonArgs(total_timesteps=1024, num_steps=1024).check_processes(1)
    with pytest.raises(ValueError, match=r"^--total-timesteps 1023 is below --num-steps 1024:"):
        CommonArgs(total_timesteps=1023, num_steps=1024).check_processes(1)


def test_rounding_leaves_the_number_of_updates_as_it_is():
    args = CommonArgs(total_timesteps=1007, num_steps=1000, num_envs=4)
    for world_size in (2, 3):
        args.check_processes(world_size)
        assert args.num_updates == 1


def test_the_decoupled_script_needs_a_player_and_a_trainer():
    DecoupledArgs().check_processes(2)
    with pytest.raises(ValueError, match=r"^one process is too few for a player and a trainer: start with `fabric run"):
        DecoupledArgs().check_processes(1)


def test_every_trainer_needs_an_experience():
    args = DecoupledArgs(num_envs=1, num_steps=2)
    args.check_processes(3)
    with pytest.raises(ValueError, match=r"^3 trainers cannot share 2 experiences: raise --num-steps"):
        args.check_processes(4)


@pytest.mark.parametrize("script_args", [TorchArgs, FabricArgs, DecoupledArgs])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_the_number_of_updates_is_the_same_for_any_number_of_processes(monkeypatch, script_args, world_size):
    set_ranks(monkeypatch, world_size=world_size)
    monkeypatch.setenv("LT_CLI_USED", "1")
    assert parse(script_args, []).num_updates == 96
    assert parse(script_args, ["--total-timesteps", "5119", "--num-steps", "1024"]).num_updates == 4


@pytest.mark.parametrize(
    ("script_args", "num_envs", "num_steps", "world_size", "rounded", "length"),
    [
        (CommonArgs, 4, 1024, 1, 1024, 256),
        (CommonArgs, 4, 1024, 2, 1024, 128),
        (CommonArgs, 4, 1000, 3, 1008, 84),
        (CommonArgs, 5, 11, 2, 20, 2),
        (CommonArgs, 1, 1, 1, 1, 1),
        (DecoupledArgs, 4, 1000, 3, 1000, 250),
        (DecoupledArgs, 3, 1000, 3, 1002, 334),
    ],
)
def test_num_steps_is_rounded_up_to_the_next_multiple_of_all_environments(
    script_args, num_envs, num_steps, world_size, rounded, length
):
    args = script_args(num_envs=num_envs, num_steps=num_steps)
    assert args.steps_per_update(world_size) == rounded
    assert args.rollout_length(world_size) == length
    assert args.num_updates == args.total_timesteps // num_steps  # as typed


def test_several_processes_of_the_script_with_fabric_need_fabric_run(monkeypatch):
    FabricArgs().check_processes(1)
    with pytest.raises(ValueError, match=r"^several processes of train_fabric.py are started with `fabric run`"):
        FabricArgs().check_processes(2)
    monkeypatch.setenv("LT_CLI_USED", "1")
    FabricArgs().check_processes(2)


@pytest.mark.parametrize("script_args", [FabricArgs, DecoupledArgs])
@pytest.mark.parametrize("precision", ["64", "16-mixed", "bf16-true"])
def test_a_precision_that_the_scripts_do_not_train_in_is_refused(monkeypatch, script_args, precision):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_PRECISION", precision)
    with pytest.raises(ValueError, match=rf"^--precision={precision} is not supported: .*=32-true$"):
        script_args().check_processes(2)
    for supported in ("32", "32-true"):
        monkeypatch.setenv("LT_PRECISION", supported)
        script_args().check_processes(2)


@pytest.mark.parametrize("strategy", ["dp", "fsdp", "deepspeed", "deepspeed_stage_3"])
def test_a_strategy_that_the_script_with_fabric_does_not_follow_is_refused(monkeypatch, strategy):
    monkeypatch.setenv("LT_STRATEGY", strategy)
    with pytest.raises(ValueError, match=rf"^--strategy={strategy} is not supported: .*=ddp$"):
        FabricArgs().check_processes(1)
    for supported in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        monkeypatch.setenv("LT_STRATEGY", supported)
        FabricArgs().check_processes(1)


def test_a_list_of_gpus_for_the_decoupled_script_is_refused_with_what_chooses_them(monkeypatch):
    monkeypatch.setenv("LT_DEVICES", "2,3")
    with pytest.raises(ValueError, match=r"^--devices=2,3: .* CUDA_VISIBLE_DEVICES=2,3 before the command"):
        DecoupledArgs().check_processes(2)
    monkeypatch.setenv("LT_DEVICES", "2")
    DecoupledArgs().check_processes(2)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_for_the_script_with_fabric_is_refused_where_there_is_none(monkeypatch, accelerator):
    monkeypatch.setenv("LT_ACCELERATOR", accelerator)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^--accelerator={accelerator} needs a GPU, .* --accelerator=cpu"):
        FabricArgs().check_processes(1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    FabricArgs().check_processes(1)


def test_rounding_is_said_in_one_line(monkeypatch, capsys):
    set_ranks(monkeypatch, world_size=3)
    args = parse(TorchArgs, ["--num-steps", "1000"])
    assert (args.num_steps, args.steps_per_update(3)) == (1000, 1008)
    assert capsys.readouterr().err == "--num-steps 1000 rounded up to 1008, the same for every environment\n"


def test_nothing_is_said_where_nothing_is_rounded(capsys):
    assert parse(TorchArgs, ["--num-steps", "1000"]).num_steps == 1000
    assert capsys.readouterr() == ("", "")


def test_the_learning_rate_falls_linearly_from_its_start_to_one_step_above_zero():
    args = CommonArgs(learning_rate=1.0, total_timesteps=4099, num_steps=1024)
    assert [args.learning_rate_at(update) for update in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


def test_the_learning_rate_stays_without_annealing():
    args = CommonArgs(learning_rate=0.5, anneal_lr=False, total_timesteps=4096, num_steps=1024)
    assert [args.learning_rate_at(update) for update in (1, 2, 3, 4)] == [0.5] * 4


def test_what_derives_from_other_arguments_is_no_flag(capsys):
    with pytest.raises(SystemExit):
        parse(DecoupledArgs, ["--help"])
    text = capsys.readouterr().out
    for name in ("num-updates", "log-root", "world-size", "rollout-length", "minibatch"):
        assert f"--{name}" not in text


@pytest.mark.parametrize(
    ("script_args", "groups"),
    [
        (TorchArgs, ["run", "environment", "data", "network", "ppo", "device"]),
        (FabricArgs, ["run", "environment", "data", "network", "ppo"]),
        (DecoupledArgs, ["run", "environment", "data", "network", "ppo", "device", "player"]),
    ],
)
def test_help_shows_the_flags_in_groups_and_ends_with_0(capsys, script_args, groups):
    with pytest.raises(SystemExit) as exit_info:
        parse(script_args, ["--help"])
    assert exit_info.value.code == 0
    titles = re.findall(r"(\w+) options [^\w]", capsys.readouterr().out)
    assert titles == groups


# Every flag of the contract that all scripts have, with a value that is not its default.
CONTRACT = {
    "env_id": "Acrobot-v1", "num_envs": 3, "seed": 7, "exp_name": "x", "total_timesteps": 50, "num_steps": 6,
    "per_rank_batch_size": 8, "update_epochs": 9, "share_data": True, "capture_video": True, "ortho_init": True,
    "activation_function": "tanh", "learning_rate": 0.1, "anneal_lr": False, "gamma": 0.2, "gae_lambda": 0.3,
    "clip_coef": 0.4, "clip_vloss": True, "ent_coef": 0.6, "vf_coef": 0.7, "max_grad_norm": 0.8,
    "normalize_advantages": False,
}  # fmt: skip


@pytest.mark.parametrize("script_args", [TorchArgs, FabricArgs, DecoupledArgs])
def test_every_flag_of_the_contract_sets_its_argument_in_every_script(monkeypatch, script_args):
    set_ranks(monkeypatch, world_size=2 if script_args is DecoupledArgs else 1)
    argv = []
    for name, value in CONTRACT.items():
        flag = name.replace("_", "-")
        argv += {True: [f"--{flag}"], False: [f"--no-{flag}"]}.get(value, [f"--{flag}", str(value)])
    defaults = asdict(script_args())
    assert all(defaults[name] != value for name, value in CONTRACT.items())
    assert asdict(parse(script_args, argv)) == defaults | CONTRACT


def test_gpus_are_chosen_with_flags_where_the_command_that_starts_the_script_does_not(monkeypatch):
    assert parse(TorchArgs, ["--cuda"]).cuda
    with pytest.raises(SystemExit):
        parse(FabricArgs, ["--cuda"])
    set_ranks(monkeypatch, world_size=2)
    args = parse(DecoupledArgs, ["--cuda", "--player-on-gpu"])
    assert (args.cuda, args.player_on_gpu) == (True, True)


def test_bare_boolean_flags_their_negations_and_underscores_are_accepted():
    args = parse(TorchArgs, ["--share-data", "--no-anneal-lr", "--ortho_init", "--num_envs", "2", "--clip_vloss"])
    assert (args.share_data, args.anneal_lr, args.ortho_init, args.clip_vloss) == (True, False, True, True)
    assert args.num_envs == 2


SPELLINGS = {True: ["--{}", "--{} True", "--{}=true", "--{}=True"], False: ["--no-{}", "--{} False", "--{}=false"]}


@pytest.mark.parametrize("name", ["capture_video", "anneal_lr", "clip-vloss", "compile", "cuda"])
@pytest.mark.parametrize(("value", "spelling"), [(v, each) for v, spellings in SPELLINGS.items() for each in spellings])
def test_a_truth_value_may_be_written_out(name, value, spelling):
    argv = [*spelling.format(name).split(), "--seed", "1"]
    assert getattr(parse(TorchArgs, argv), name.replace("-", "_")) is value


def test_a_truth_value_that_is_none_is_refused():
    for argv in (["--cuda", "maybe"], ["--cuda=2"], ["--no-cuda", "True"], ["True"]):
        with pytest.raises(SystemExit):
            parse(TorchArgs, argv)


def test_whole_numbers_may_be_written_in_scientific_notation():
    args = parse(TorchArgs, ["--total-timesteps", "1e6", "--num-steps=2.048E3", "--hidden-sizes", "1e2", "64"])
    assert (args.total_timesteps, args.num_steps, args.hidden_sizes) == (1_000_000, 2048, (100, 64))
    assert [type(number) for number in (args.total_timesteps, *args.hidden_sizes)] == [int] * 3


@pytest.mark.parametrize("number", ["1.5e0", "1e-1", "1e999", "inf", "nan", "many", ""])
def test_a_number_that_is_not_whole_is_refused(capsys, number):
    with pytest.raises(SystemExit):
        parse(TorchArgs, ["--total-timesteps", number])
    assert "--total-timesteps" in capsys.readouterr().err


def test_networks_that_do_not_fit_into_memory_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(TorchArgs, ["--hidden-sizes", "64", "10000000", "10000000"])
    line = r"error: --hidden-sizes 64 10000000 10000000: .* take 3,200,021 GB, this machine has \d+ GB\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert parse(TorchArgs, ["--hidden-sizes", "1000", "1000"]).hidden_sizes == (1000, 1000)


def test_what_the_networks_take_is_counted_in_weights_gradients_and_adams_two_moments():
    weights = (4 + 1) * 7 + (7 + 1) * 3
    assert CommonArgs(hidden_sizes=(7, 3)).network_bytes(num_features=4) == 2 * weights * 4 * 4
    assert CommonArgs(hidden_sizes=()).network_bytes(num_features=4) == 0


@pytest.mark.parametrize("script_args", [TorchArgs, FabricArgs, DecoupledArgs])
def test_help_can_be_printed_on_any_terminal(capsys, script_args):
    with pytest.raises(SystemExit):
        parse(script_args, ["--help"])
    letters = {letter for letter in capsys.readouterr().out if not letter.isascii()}
    assert letters <= set("╭─╮│╰╯")  # tyro leaves its boxes out where they cannot be printed


def test_arguments_that_are_not_given_keep_their_defaults():
    assert parse(TorchArgs, []) == TorchArgs()
    assert parse(FabricArgs, []) == FabricArgs()


def test_a_flag_beside_resume_is_checked_together_with_the_flags_of_the_run(monkeypatch):
    checkpoint = {"world_size": 2, "update": 3, "best_return": None, "path": "run/checkpoints/update_3.ckpt"}
    monkeypatch.setattr("rl.run.resuming.load_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr("rl.run.resuming.run_args", lambda *_: DecoupledArgs(cuda=True))
    set_ranks(monkeypatch, world_size=2)
    args = parse(DecoupledArgs, ["--resume", "run", "--player-on-gpu"])
    assert args == DecoupledArgs(cuda=True, player_on_gpu=True, resume=checkpoint["path"])


def test_a_misspelled_flag_is_refused_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(TorchArgs, ["--num-env", "2"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "--num-env," in error
    assert "--num-envs INT" in error


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--gamma", "2"], "error: --gamma must be between 0 and 1, got 2.0"),
        (
            ["--env-id", "CarRacing-v3", "--normalize-observations"],
            "error: --normalize-observations: the observations of CarRacing-v3 are images, scaled already",
        ),
        (
            ["--noise-correlation", "0.5"],
            "error: --noise-correlation is for continuous actions, CartPole-v1 takes Discrete(2)",
        ),
        (
            ["--init-log-std", "-1"],
            "error: --init-log-std is for continuous actions, CartPole-v1 takes Discrete(2)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_1(capsys, argv, line):
    with pytest.raises(SystemExit) as exit_info:
        parse(TorchArgs, argv)
    assert exit_info.value.code == 1
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize(
    "argv", [["--gamma", "2"], ["--num-env", "2"], ["--help"], ["--num-steps", "1000"], ["--env-id", "LunarLander-v2"]]
)
def test_only_rank_0_talks(monkeypatch, capsys, argv):
    set_ranks(monkeypatch, rank=1, world_size=3)
    with contextlib.suppress(SystemExit):
        parse(TorchArgs, argv)
    assert capsys.readouterr() == ("", "")


def test_a_log_folder_that_cannot_be_made_is_reported_before_the_run(capsys, tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    with pytest.raises(SystemExit) as exit_info:
        parse(TorchArgs, [])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("error: the log folder logs/torch_logs cannot be written to: ")


def test_a_retired_environment_is_replaced_by_its_successor_and_one_line_says_so(capsys):
    assert parse(TorchArgs, ["--env-id", "LunarLander-v2"]).env_id == "LunarLander-v3"
    assert capsys.readouterr().err == "LunarLander-v2 is retired, running its successor LunarLander-v3\n"


def test_plain_python_is_a_world_of_one_process(monkeypatch):
    for name in voice.LAUNCH_VARIABLES:
        monkeypatch.delenv(name)
    assert read_ranks() == (0, 0, 1, 1)
    assert read_ranks() == (0, 0, 1, 1)  # now from the variables that the first call has set


@pytest.mark.parametrize("name", ["RANK", "MASTER_PORT"])
def test_a_launcher_that_sets_only_some_variables_is_reported(monkeypatch, capsys, name):
    monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as exit_info:
        read_ranks()
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: the launcher's variable {name} is not set")
