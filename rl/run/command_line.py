"""Parses and checks the command line, before anything slow is imported and before the processes connect."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from gymnasium.spaces import Box, Space
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from rl.args import GROUPS, CommonArgs
from rl.environments.making import check_backend, check_video, read_spaces, resolve_env_id
from rl.presets import PRESETS
from rl.processes.ranks import end_with_launcher, read_ranks
from rl.run.folder import run_before_restart
from rl.spaces import IMAGE_FEATURES, Vector, is_image, observation_parts
from rl.voice import fail, is_rank_zero, keep_streams, say, wait_for_rank_zero

Args = TypeVar("Args", bound=CommonArgs)
Options = TypeVar("Options")

# A flag of three states: where neither word is given, the value is None, and the run decides.
THREE_STATES = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}

WHOLE_NUMBERS = ConstructorRegistry()

# Flags that may change when a run is resumed; num_envs only if the run has as many environments in all as before.
CHANGEABLE = {
    "total_timesteps",
    "num_envs",
    "env_threads",
    "capture_video",
    "test_episodes",
    "max_test_steps",
    "eval_every",
    "eval_episodes",
    "stop_at",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "cuda",
    "player_on_gpu",
    "timeout",
}


def parse(script_args: type[Args], argv: list[str] | None = None) -> Args:
    """Parse and check the command line of a script.

    Every rank finds the same mistake and ends by itself; rank 0 says why, in one line.

    Args:
        script_args: the dataclass of the script's arguments.
        argv: the arguments, `sys.argv[1:]` by default.

    Returns:
        The arguments as typed; only `env_id` is resolved.

    Raises:
        SystemExit: on `--help` or on bad input.
    """
    ranks = read_ranks()
    world_size = ranks.world_size
    end_with_launcher()
    keep_streams()
    _search_working_directory()
    try:
        flags = _parse_flags(argv, script_args())
        before = run_before_restart()
        if before is not None and any(before.glob("checkpoints/*.ckpt")):
            args = _resumed(script_args, argv, before, world_size, restarted=True)
        elif flags["resume"]:
            args = _resumed(script_args, argv, Path(flags["resume"]), world_size)
        else:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                say("restarted: no checkpoint yet, beginning anew")
            if flags["preset"] is not None:
                flags = _parse_flags(argv, _preset_args(script_args, flags["preset"]))
            args = script_args(**flags)
        args.check_processes(world_size)
        args = replace(args, env_id=resolve_env_id(args.env_id))
        observation_space, action_space = read_spaces(args)
        if args.normalize_observations and is_image(observation_space):
            raise ValueError(f"--normalize-observations: the observations of {args.env_id} are images, scaled already")
        for flag, value in (("noise-correlation", args.noise_correlation), ("init-log-std", args.init_log_std)):
            if value and not isinstance(action_space, Box):
                raise ValueError(f"--{flag} is for continuous actions, {args.env_id} takes {action_space}")
        check_backend(args, observation_space, action_space)
        _check_memory(args, observation_space, ranks.local_world_size)
        if args.capture_video:
            check_video(args)
        if "wandb" in args.logger and find_spec("wandb") is None:
            raise ValueError("--logger wandb needs Weights & Biases: pip install -r requirements-wandb.txt")
        _check_log_root(args.log_root)
    except ValueError as error:
        fail(str(error))
    if args.preset and not args.resume:
        say(f"preset {args.preset}: {PRESETS[args.preset].result}")
    if (steps := args.steps_per_update(world_size)) != args.num_steps:
        say(f"--num-steps {args.num_steps} rounded up to {steps}, the same for every environment")
    return args


def _preset_args(script_args: type[Args], name: str) -> Args:
    """Return the arguments of a preset; those that it does not set have their defaults.

    Raises:
        ValueError: with one line, if there is no such preset.
    """
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=1)
        perhaps = f": perhaps {nearest[0]}?" if nearest else "."
        raise ValueError(f"there is no preset {name!r}{perhaps} There are {', '.join(sorted(PRESETS))}")
    return script_args(**PRESETS[name].flags)


def _check_memory(args: CommonArgs, observation_space: Space, processes_here: int) -> None:
    """Check that the networks of all processes of this machine fit into its memory.

    Raises:
        ValueError: with one line, if not.
    """
    num_features = sum(
        part.size if isinstance(part, Vector) else IMAGE_FEATURES for part in observation_parts(observation_space)
    )
    needed = args.network_bytes(num_features) * processes_here
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"--hidden-sizes {' '.join(map(str, args.hidden_sizes))}: the networks and their optimizer take "
            f"{needed // 10**9:,} GB, this machine has {memory // 10**9:,} GB"
        )


def _check_log_root(log_root: Path) -> None:
    """Check that a run's folder can be made below `log_root`.

    Raises:
        ValueError: with one line, if nothing can be written there.
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
    """Parse the flags again; those of the run that is resumed are the defaults.

    Only a run that the launcher restarted may have made all its updates: its test is left.

    Raises:
        ValueError: with one line, if the run cannot go on so.
    """
    from rl.run.resuming import load_checkpoint, run_args  # here, so that only a resumed run waits for torch twice

    checkpoint = load_checkpoint(run_or_checkpoint)
    known = {field.name for field in fields(script_args)}
    before = run_args(checkpoint, script_args)
    args = script_args(**_parse_flags(argv, before))
    args = replace(args, env_id=resolve_env_id(args.env_id))  # as it was when the run began
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
    elif args.is_solved_by(checkpoint["best_return"]):
        raise ValueError(f"the run has reached --stop-at {args.stop_at:g}: raise it to train on, without end with inf")
    if args.anneal_lr and args.num_updates != before.num_updates:
        rates = before.learning_rate_at(checkpoint["update"]), args.learning_rate_at(checkpoint["update"] + 1)
        say(f"with another --total-timesteps the learning rate, annealed, goes from {rates[0]:.2g} to {rates[1]:.2g}")
    if checkpoint["world_size"] != world_size:
        say("resumed with another number of processes: from here on it is another run, not bit for bit the same")
    return replace(args, resume=str(checkpoint["path"]))


def _parse_flags(argv: list[str] | None, defaults: CommonArgs) -> dict[str, Any]:
    """Parse the flags, in the groups that the help shows, and return the values of all arguments by their names."""
    groups = {
        title: group(**{field.name: getattr(defaults, field.name) for field in fields(group)})
        for title, group in GROUPS.items()
        if isinstance(defaults, group)
    }
    try:
        parsed = tyro.cli(
            dict,
            default=groups,
            args=_words(type(defaults), argv),
            description=type(defaults).__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=is_rank_zero(),
            registry=WHOLE_NUMBERS,
        )
    except SystemExit:
        wait_for_rank_zero()
        raise
    return {name: value for group in parsed.values() for name, value in vars(group).items()}


def parse_options(options: type[Options]) -> Options:
    """Parse the command line of a module that is run as a command, such as `python -m rl.evaluate`.

    Args:
        options: the dataclass of its flags; its docstring is the help's first line.

    Raises:
        SystemExit: on `--help` or on bad input.
    """
    _search_working_directory()
    return tyro.cli(options, args=_words(options), description=options.__doc__, registry=WHOLE_NUMBERS)


def _search_working_directory() -> None:
    """Let modules be imported from the working directory, where the user's own environments may lie."""
    if "" not in sys.path:
        sys.path.append("")


def _words(options: type, argv: Sequence[str] | None = None) -> list[str]:
    """Return the words of the command line; tyro takes `--flag True` and `--flag=false` as `--flag` and `--no-flag`."""
    kinds = get_type_hints(options)
    truths = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if kind in (bool, bool | None)}
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if word.capitalize() in ("True", "False") and words and words[-1].replace("_", "-") in truths:
            word = f"{words.pop()}={word}"
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") in truths and value.capitalize() in ("True", "False"):
            word = flag if value.capitalize() == "True" else f"--no-{flag.removeprefix('--')}"
        words.append(word)
    return [part for word in words for part in THREE_STATES.get(word, [word])]


@WHOLE_NUMBERS.primitive_rule
def _whole_number(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Let tyro accept whole numbers in scientific notation, too: `--total-timesteps 1e6`."""
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _to_int(words[0]),
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


def _to_int(text: str) -> int:
    """Return the whole number that a text says.

    Raises:
        ValueError: if it says none.
    """
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))
