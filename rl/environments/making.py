"""Environments: checked, made to step together, seeded and recorded."""

import os
import re
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import find_highest_version, parse_env_id
from gymnasium.error import DependencyNotInstalled, DeprecatedEnv, UnregisteredEnv, VersionNotFound
from gymnasium.wrappers import AtariPreprocessing, FlattenObservation, FrameStackObservation, RecordVideo

from rl.args import CommonArgs, EnvironmentArgs
from rl.environments.replay import ReplayableEnv, ReplayableEnvs
from rl.environments.wrappers import LifeLoss, PressFire, StackChannels
from rl.seeding import Purpose, stream_seed
from rl.spaces import check_action_space, has_channels_last, is_image, observation_parts
from rl.voice import going_on_without, say

if TYPE_CHECKING:
    from rl.environments.envpool_envs import EnvPoolEnvs

    Envs = ReplayableEnvs | EnvPoolEnvs  # those that can be put back, and the other kind

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn in memory, no display is asked for
gym.logger.min_level = gym.logger.ERROR  # its warnings are for authors of environments


# Modules that register environments, by the beginning of their ids; pip knows the packages by the same name.
MODULES = {"MiniGrid": "minigrid", "BabyAI": "minigrid", "Fetch": "gymnasium_robotics", "Hand": "gymnasium_robotics"}


def resolve_env_id(env_id: str) -> str:
    """Return `env_id`, or its successor where Gymnasium retired it in favour of a newer version."""
    try:
        gym.spec(env_id)
    except DeprecatedEnv:
        namespace, name, _ = parse_env_id(env_id)
        successor = f"{namespace + '/' if namespace else ''}{name}-v{find_highest_version(namespace, name)}"
        say(f"{env_id} is retired, running its successor {successor}")
        return successor
    except Exception:
        pass  # an id that names a module to import, or a mistake that `read_spaces` reports
    return env_id


def read_spaces(args: EnvironmentArgs) -> tuple[gym.Space, gym.Space]:
    """Return the observation space and the action space of the environment, which is made once to be asked.

    Raises:
        ValueError: in one line, if it cannot be made or has a space that is not supported.
    """
    return _read_spaces(args.env_id, tuple(args.env_kwargs), tuple(args.wrappers), args.frame_stack)


@cache
def _read_spaces(
    env_id: str, env_kwargs: tuple[str, ...], wrappers: tuple[str, ...], frame_stack: int | None
) -> tuple[gym.Space, gym.Space]:
    args = CommonArgs(env_id=env_id, env_kwargs=env_kwargs, wrappers=wrappers, frame_stack=frame_stack)
    try:
        with _make(args) as env:
            observation_space, action_space = env.observation_space, env.action_space
    except Exception as error:  # whatever the environment's own code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot make the environment {args.env_id}: {reason}{_advice(args.env_id, error)}") from None
    try:
        observation_parts(observation_space)
        check_action_space(action_space)
    except ValueError as error:
        raise ValueError(f"{args.env_id}: {' '.join(str(error).split())}") from None
    return observation_space, action_space


def check_backend(args: EnvironmentArgs, observation_space: gym.Space, action_space: gym.Space) -> None:
    """Check that the backend has the environment.

    Raises:
        ValueError: in one line, if not.
    """
    if args.env_backend == "gymnasium":
        return
    if find_spec("envpool") is None:
        raise ValueError("--env-backend envpool needs EnvPool: pip install -r requirements-envpool.txt")
    from rl.environments.envpool_envs import check_envpool  # here, because EnvPool is optional

    check_envpool(args, observation_space, action_space)


def check_video(args: EnvironmentArgs) -> None:
    """Check that episodes can be recorded.

    Raises:
        ValueError: in one line, if the environment draws no pictures or the package that writes videos is missing.
    """
    with _make(args) as env:
        if "rgb_array" not in env.metadata.get("render_modes", []):
            raise ValueError(f"{args.env_id} has no render mode rgb_array, so no video can be recorded")
    if find_spec("moviepy") is None:
        raise ValueError("videos need the package moviepy: pip install -r requirements.txt")


class Recorder(RecordVideo):
    """Records videos as long as the disk takes them: training does not end for one. Their names end with the return."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, which ends the video of the last episode."""
        begun = super().reset(seed=seed, options=options)
        self.episode_return = 0.0
        return begun

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        step = super().step(action)
        self.episode_return += float(step[1])
        return step

    def stop_recording(self) -> None:
        """Write the video."""
        self._video_name = f"{self._video_name}-return-{self.episode_return:.1f}"
        with going_on_without("a video"):
            super().stop_recording()
        self.recorded_frames, self.recording, self._video_name = [], False, None


def record_training(folder: Path) -> Callable[[gym.Env], gym.Env]:
    """Return a wrapper that records the episodes 0, 1, 8, 27, ..., 1000, 2000, ... of an environment."""
    return lambda env: Recorder(env, str(folder), name_prefix=_free_name(folder, "train"))


def record_first_episode(folder: Path, name: str) -> Callable[[gym.Env], gym.Env]:
    """Return a wrapper that records the first episode of an environment."""

    def record(env: gym.Env) -> gym.Env:
        prefix = _free_name(folder, name)
        return Recorder(env, str(folder), name_prefix=prefix, episode_trigger=lambda episode: episode == 0)

    return record


def make_envs(args: EnvironmentArgs, num_envs: int, record: Callable[[gym.Env], gym.Env] | None = None) -> "Envs":
    """Make environments that step together, with episode statistics; observations are images, or flat.

    Gymnasium's can be put back exactly where they were, EnvPool's begin new episodes instead.

    Args:
        args: all of `EnvironmentArgs` but `num_envs`.
        num_envs: number of environments.
        record: wraps the first environment to record it. The others never render: in LunarLander a render mode
            alone makes every step three times slower.
    """

    def make_env(record: Callable[[gym.Env], gym.Env] | None) -> ReplayableEnv:
        env = record(_make(args, render_mode="rgb_array")) if record else _make(args)
        space = env.observation_space
        is_flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        return ReplayableEnv(env if is_flat or is_image(space) else FlattenObservation(env))

    if args.env_backend == "envpool":
        from rl.environments.envpool_envs import EnvPoolEnvs  # here, because EnvPool is optional

        return EnvPoolEnvs(args, num_envs, *read_spaces(args))

    return ReplayableEnvs([partial(make_env, record if index == 0 else None) for index in range(num_envs)])


def reset_envs(envs: "Envs", seed: int, first_index: int, purpose: Purpose = Purpose.ENVIRONMENT) -> np.ndarray:
    """Reset all environments, each with its own seed, and return their first observations [N, *shape].

    Args:
        envs: N environments.
        seed: seed of the run.
        first_index: index of the first environment among those of all processes.
        purpose: the kind of the random streams.
    """
    indices = range(first_index, first_index + envs.num_envs)
    observations, _ = envs.reset(seed=[stream_seed(seed, purpose, index) for index in indices])
    return observations


def _advice(env_id: str, error: Exception) -> str:
    """Return what to do where an environment's package may be missing, else nothing: Gymnasium says it all."""
    named, _, name = env_id.rpartition(":")
    module = next((module for start, module in MODULES.items() if name.startswith(start)), None)
    if named and isinstance(error, ModuleNotFoundError):
        return f" Install what is missing (pip install {module or '...'}), or start where {named} can be imported."
    if isinstance(error, DependencyNotInstalled) and "mujoco" in str(error).lower():
        return " Better: pip install -r requirements-mujoco.txt"
    if name.startswith("MinAtar") and isinstance(error, UnregisteredEnv) and not find_spec("minatar"):
        return " It comes with a package: pip install -r requirements-minatar.txt"
    if named or not isinstance(error, UnregisteredEnv) or isinstance(error, VersionNotFound):
        return ""
    if module:
        return f" It comes with a package: pip install {module}, then --env-id {module}:{env_id}"
    if "Did you mean" in str(error):
        return ""
    game = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "-v5", name.rpartition("/")[2])
    return (
        f" An Atari game is named ALE/{game} (pip install -r requirements-atari.txt), and a package's environments "
        "are named module:Id (pip install minigrid, --env-id minigrid:MiniGrid-Empty-8x8-v0)"
    )


def _free_name(folder: Path, name: str) -> str:
    """Return a name that no video in the folder begins with: a resumed run counts its episodes from 0 again."""
    names = (f"{name}-{number}" if number > 1 else name for number in count(1))
    return next(free for free in names if not any(folder.glob(f"{free}-episode-*")))


def _make(args: EnvironmentArgs, **kwargs: Any) -> gym.Env:
    """Make one environment, with the wrappers that the flags name."""
    kwargs = args.env_arguments() | kwargs
    is_atari = args.env_id.startswith("ALE/")
    if args.env_id.startswith("MinAtar/") and find_spec("minatar"):
        from minatar.gym import register_envs  # here, because it is optional

        register_envs()
    env = _make_atari(args.env_id, kwargs) if is_atari else gym.make(args.env_id, **kwargs)
    for name in args.wrappers:
        env = resolve_name(name)(env)
        if not isinstance(env, gym.Env):
            raise TypeError(f"--wrappers {name} gave no environment, but {env!r}")
    if args.terminal_on_life_loss:
        env = LifeLoss(env)
    frames = args.frame_stack or (4 if is_atari else 1)
    if frames == 1:
        return env
    image = env.observation_space
    stack = FrameStackObservation(env, frames)
    return StackChannels(stack, has_channels_last(image.shape)) if is_image(image) and len(image.shape) == 3 else stack


def _make_atari(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """Make an Atari game with the customary preprocessing (Machado et al. 2018)."""
    if find_spec("ale_py") is None or find_spec("cv2") is None:
        raise ImportError("Atari needs more packages: pip install -r requirements-atari.txt")
    import ale_py  # here, because it is optional; it registers the games

    gym.register_envs(ale_py)
    game = AtariPreprocessing(gym.make(env_id, frameskip=1, **kwargs), frame_skip=4)
    waits_for_fire = game.unwrapped.get_action_meanings()[1] == "FIRE"  # type: ignore[attr-defined]  # of the game
    return PressFire(game) if waits_for_fire else game
