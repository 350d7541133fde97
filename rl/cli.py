"""The command line: parsed and checked before anything slow is imported and before processes meet."""

import os
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import asdict, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tyro
from gymnasium.spaces import Box

from rl.args import CommonArgs
from rl.envs import check_backend, check_video, read_spaces, resolve_env_id
from rl.launch import end_with_launcher, fail, is_rank_zero, read_ranks, say, wait_for_rank_zero
from rl.presets import PRESETS
from rl.run_folder import run_before_restart
from rl.spaces import is_image

Args = TypeVar("Args", bound=CommonArgs)

# A flag of three states: neither is written for the default, which depends on the run.
THREE_STATES = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}

# What may differ when a run is resumed; num_envs as long as there are as many environments in all.
CHANGEABLE = {
    "total_timesteps",
    "num_envs",
    "capture_video",
    "test_episodes",
    "max_test_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "cuda",
    "player_on_gpu",
    "timeout",
}


def parse(script_args: type[Args], argv: list[str] | None = None) -> Args:
    """Parse and check the command line, before anything slow is imported and before processes meet.

    Every rank sees the same mistake, so every rank ends by itself; rank 0 says why, in one line.

    Args:
        script_args: the dataclass of the script's arguments.
        argv: the arguments, `sys.argv[1:]` by default.

    Returns:
        The arguments with `env_id` resolved and `num_steps` rounded to what the environments share evenly.

    Raises:
        SystemExit: on `--help` or on bad input.
    """
    world_size = read_ranks().world_size
    end_with_launcher()
    try:
        args = script_args(**_parse_groups(script_args, argv, _defaults(script_args, argv)))
        before = run_before_restart()
        if before is not None and any(before.glob("checkpoints/*.ckpt")):
            args = _resumed(script_args, argv, before, world_size, restarted=True)
        elif args.resume:
            args = _resumed(script_args, argv, Path(args.resume), world_size)
        elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            say("restarted: no checkpoint yet, beginning anew")
        args.check_processes(world_size)
        args = replace(args, env_id=resolve_env_id(args.env_id))
        observation_space, action_space = read_spaces(args)
        if args.normalize_observations and is_image(observation_space):
            raise ValueError(f"--normalize-observations: the observations of {args.env_id} are images, scaled already")
        if args.noise_correlation and not isinstance(action_space, Box):
            raise ValueError(f"--noise-correlation is for continuous actions, {args.env_id} takes {action_space}")
        check_backend(args, observation_space, action_space)
        if args.capture_video:
            check_video(args)
        _check_log_root(args.log_root)
    except ValueError as error:
        fail(str(error))
    if args.preset and not args.resume:
        say(f"preset {args.preset}: {PRESETS[args.preset].result}")
    rounded = args.rounded(world_size)
    if rounded.num_steps != args.num_steps:
        say(f"--num-steps {args.num_steps} rounded up to {rounded.num_steps}, the same for every environment")
    return rounded


def _defaults(script_args: type[Args], argv: list[str] | None) -> Args:
    """Return the arguments for which no flag is given: those of the preset, if one is named."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", nargs="?")  # what is wrong with it is said later, among all the flags
    preset = PRESETS.get(finder.parse_known_args(argv)[0].preset)
    return script_args(**preset.flags) if preset else script_args()


def _part(group: type, args: CommonArgs) -> Any:
    """Return what `args` holds of the arguments of a group."""
    return group(**{part.name: getattr(args, part.name) for part in fields(group)})


def _check_log_root(log_root: Path) -> None:
    """Check that a run's folder can be made below `log_root`.

    Raises:
        ValueError: if nothing can be written there.
    """
    try:
        log_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_root):
            pass
    except OSError as error:
        raise ValueError(f"the log folder {log_root} cannot be written to: {error.strerror}") from None


def _resumed(
    script_args: type[Args],
    argv: list[str] | None,
    run_or_checkpoint: Path,
    world_size: int,
    restarted: bool = False,
) -> Args:
    """Parse the flags again, with those of the run that is resumed as defaults.

    A run that the launcher restarted may be complete but for its test.

    Raises:
        ValueError: with one line, if the run cannot go on so.
    """
    from rl.checkpoint import load_checkpoint  # here, so that only a resumed run waits for torch twice

    checkpoint = load_checkpoint(run_or_checkpoint)
    known = {field.name for field in fields(script_args)}
    before = script_args(**{name: value for name, value in checkpoint["args"].items() if name in known})
    args = script_args(**_parse_groups(script_args, argv, before))
    for name in known - CHANGEABLE:
        if getattr(args, name) != getattr(before, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} cannot change when a run is resumed: it is {getattr(before, name)!r}")
    environments = args.num_envs * args.env_processes(world_size)
    environments_before = before.num_envs * before.env_processes(checkpoint["world_size"])
    if environments != environments_before:
        raise ValueError(
            f"the run has {environments_before} environments in all, not {environments}: "
            "choose the number of processes and --num-envs accordingly"
        )
    if restarted:
        say(f"restarted: going on after update {checkpoint['update']} of {run_or_checkpoint}")
    elif checkpoint["update"] >= args.num_updates:
        raise ValueError("the run is complete: raise --total-timesteps to train on")
    if checkpoint["world_size"] != world_size:
        say("resumed with another number of processes: from here on it is another run, not bit for bit the same")
    return replace(args, resume=str(checkpoint["path"]))


def _parse_groups(script_args: type[Args], argv: list[str] | None, defaults: Args) -> dict[str, Any]:
    """Parse the flags; each root class of `script_args` is a group of the help."""
    groups = [base for base in reversed(script_args.__mro__) if base.__bases__ == (object,)]
    named = [
        (group.__name__.removesuffix("Args").lower(), group, field(default_factory=partial(_part, group, defaults)))
        for group in groups
    ]
    try:
        parsed = tyro.cli(
            make_dataclass("Grouped", named),
            args=[part for word in (sys.argv[1:] if argv is None else argv) for part in THREE_STATES.get(word, [word])],
            description=script_args.__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=is_rank_zero(),
        )
    except SystemExit:
        wait_for_rank_zero()
        raise
    return {name: value for group in asdict(parsed).values() for name, value in group.items()}
