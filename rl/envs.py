"""Environments: which are supported, how a vector of them is made, seeded and recorded."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import find_highest_version, parse_env_id
from gymnasium.error import DeprecatedEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation, RecordVideo
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from rl.launch import say
from rl.seeding import Purpose, stream_seed

gym.logger.min_level = gym.logger.ERROR  # its warnings are for authors of environments


def resolve_env_id(env_id: str) -> str:
    """Return `env_id`, or its successor where Gymnasium retired it in favour of a newer version."""
    try:
        gym.spec(env_id)
    except DeprecatedEnv:
        namespace, name, _ = parse_env_id(env_id)
        successor = f"{namespace + '/' if namespace else ''}{name}-v{find_highest_version(namespace, name)}"
        say(f"{env_id} is retired, running its successor {successor}")
        return successor
    except gym.error.Error:
        pass  # an id that names a module to import, or a mistake that `check_environment` reports
    return env_id


def check_environment(env_id: str, capture_video: bool = False) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    """Make the environment once and return its observation space, flat as in `make_env`, and its action space.

    Raises:
        ValueError: in one line, if it cannot be made, or has a space that is not supported, or videos are wanted
            and the environment draws no pictures or the package that writes videos is missing.
    """
    try:
        with gym.make(env_id) as env:
            observation_space, action_space = env.observation_space, env.action_space
            render_modes = env.metadata.get("render_modes", [])
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {env_id}: {' '.join(str(error).split())}") from None
    if not isinstance(observation_space, gym.spaces.Box):
        raise ValueError(f"{env_id} has the observation space {observation_space}; supported is Box")
    if not isinstance(action_space, gym.spaces.Discrete):
        raise ValueError(f"{env_id} has the action space {action_space}; supported is Discrete")
    if capture_video and "rgb_array" not in render_modes:
        raise ValueError(f"--capture-video: {env_id} has no render mode rgb_array to record")
    if capture_video and find_spec("moviepy") is None:
        raise ValueError("--capture-video needs the package moviepy: pip install -r requirements.txt")
    return gym.spaces.flatten_space(observation_space), action_space


def record_training(folder: Path) -> Callable[[gym.Env], gym.Env]:
    """Return a wrapper that records the episodes 0, 1, 8, 27, ..., 1000, 2000, ... of an environment."""
    return lambda env: RecordVideo(env, str(folder), name_prefix="train")


def record_first_episode(folder: Path, name: str) -> Callable[[gym.Env], gym.Env]:
    """Return a wrapper that records the first episode of an environment."""
    return lambda env: RecordVideo(env, str(folder), name_prefix=name, episode_trigger=lambda episode: episode == 0)


def make_envs(env_id: str, num_envs: int, record: Callable[[gym.Env], gym.Env] | None = None) -> VectorEnv:
    """Make environments that step together, with flat observations and episode statistics.

    Args:
        env_id: Gymnasium id.
        num_envs: number of environments.
        record: wraps the first environment to record it. The others never render: in LunarLander a render mode
            alone makes every step three times slower.
    """

    def make_env(record: Callable[[gym.Env], gym.Env] | None) -> gym.Env:
        env = record(gym.make(env_id, render_mode="rgb_array")) if record else gym.make(env_id)
        return env if len(env.observation_space.shape) == 1 else FlattenObservation(env)

    # SAME_STEP: the step that ends an episode also resets the environment. It returns the new episode's first
    # observation, and the final one in `info["final_obs"]`. Gymnasium's default would insert a step that ignores
    # the action, which must not be learnt from.
    envs = SyncVectorEnv(
        [partial(make_env, record if index == 0 else None) for index in range(num_envs)],
        copy=False,  # the rollout copies observations into its own array
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    return RecordEpisodeStatistics(envs)


def reset_envs(envs: VectorEnv, seed: int, first_index: int, purpose: Purpose = Purpose.ENVIRONMENT) -> np.ndarray:
    """Reset all environments, each with its own seed, and return their first observations [N, D].

    Args:
        envs: N environments.
        seed: seed of the run.
        first_index: index of the first environment among those of all processes.
        purpose: the kind of the random streams.
    """
    indices = range(first_index, first_index + envs.num_envs)
    observations, _ = envs.reset(seed=[stream_seed(seed, purpose, index) for index in indices])
    return observations
