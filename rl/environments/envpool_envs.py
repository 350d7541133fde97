"""EnvPool's environments, with the meaning that Gymnasium's have here: an episode's end resets in the same step."""

from typing import Any

import envpool
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rl.args import EnvironmentArgs
from rl.environments.replay import MARKS
from rl.seeding import episode_seed
from rl.spaces import stored_space


class EnvPoolEnvs(VectorEnv):
    """N environments of EnvPool, which step in threads of its own.

    EnvPool alone would answer the step after an episode's end with the reset, whatever the action: a transition that
    never was. So those environments are stepped once more at once, and their final observations handed on apart.

    Args:
        args: `env_id` and `env_threads` count here.
        num_envs: N.
        observation_space: of one environment.
        action_space: of one environment.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (so declared by Gymnasium)

    def __init__(
        self, args: EnvironmentArgs, num_envs: int, observation_space: gym.Space, action_space: gym.Space
    ) -> None:
        self.env_id, self.num_threads = args.env_id, args.env_threads
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space, self.action_space = (
            batch_space(observation_space, num_envs),
            batch_space(action_space, num_envs),
        )
        self.action_dtype = np.float32 if isinstance(action_space, gym.spaces.Box) else np.int32

    def reset(  # type: ignore[override]  # each environment has a seed
        self, *, seed: list[int], options: None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Make the environments with these seeds, one each, and return their first observations [N, *shape]."""
        self.seeds, self.episodes = list(seed), np.zeros(self.num_envs, dtype=np.int64)
        self.episode_returns, self.episode_lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.marks: dict[int, np.ndarray] = {}
        self.pool = envpool.make(
            self.env_id,
            env_type="gymnasium",
            num_envs=self.num_envs,
            num_threads=min(self.num_threads, self.num_envs),
            env_seed=self.seeds,
        )
        observations, _ = self.pool.reset()
        return observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations [N, *shape], rewards, terminations, truncations, each [N], and the ends of episodes."""
        actions = actions.astype(self.action_dtype)
        observations, rewards, terminations, truncations, _ = self.pool.step(actions)
        self.episode_returns += rewards
        self.episode_lengths += 1
        ended = terminations | truncations
        if not ended.any():
            return observations, rewards, terminations, truncations, {}
        indices = np.flatnonzero(ended)
        final_observations = np.full(self.num_envs, None, dtype=object)
        for index in indices:
            final_observations[index] = observations[index].copy()
        observations[ended] = self.pool.step(actions[ended], indices.astype(np.int32))[0]
        statistics = {"r": np.where(ended, self.episode_returns, 0), "l": np.where(ended, self.episode_lengths, 0)}
        self.episode_returns[ended] = 0
        self.episode_lengths[ended] = 0
        self.episodes[ended] += 1
        info = {"final_obs": final_observations, "_final_obs": ended, "episode": statistics, "_episode": ended}
        return observations, rewards, terminations, truncations, info

    def mark(self, update: int) -> None:
        """Remember how many episodes there were, at the end of the rollout for an update."""
        self.marks = dict([*self.marks.items(), (update, self.episodes.copy())][-MARKS:])

    def states(self, update: int) -> list[dict[str, Any]]:
        """Return of each environment its seed and how many episodes it had: EnvPool's random state cannot be read."""
        return [
            {"seed": seed, "episode": int(episode)}
            for seed, episode in zip(self.seeds, self.marks[update], strict=True)
        ]

    def restore(self, states: list[dict[str, Any]]) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
        """Begin new episodes, with seeds that no episode before had.

        Returns:
            The observations [N, *shape], no rewards, and a line that says so.
        """
        self.pool.close()
        seeds = [state["seed"] for state in states]
        observations, _ = self.reset(seed=[episode_seed(state["seed"], state["episode"]) for state in states])
        self.seeds, self.episodes[:] = seeds, [state["episode"] + 1 for state in states]
        return observations, [np.zeros(0)] * self.num_envs, ["EnvPool's environments cannot be put back"]

    def close(self, **kwargs: Any) -> None:
        """End EnvPool's threads."""
        self.pool.close()


def check_envpool(args: EnvironmentArgs, observation_space: gym.Space, action_space: gym.Space) -> None:
    """Check that EnvPool runs the same environment as Gymnasium.

    Raises:
        ValueError: in one line, if it does not have it, or with other spaces, or not with these arguments.
    """
    if args.env_kwargs:
        raise ValueError("--env-kwargs goes with --env-backend gymnasium: EnvPool takes no such arguments")
    if args.env_id not in envpool.list_all_envs():
        raise ValueError(f"EnvPool has no {args.env_id}: leave --env-backend out")
    spec = envpool.make_spec(args.env_id)
    theirs = spec.gymnasium_observation_space, spec.gymnasium_action_space
    same = [space.shape for space in theirs] == [observation_space.shape, action_space.shape]
    if not same or stored_space(observation_space) != observation_space:
        raise ValueError(
            f"EnvPool's {args.env_id} has other spaces than Gymnasium's, made flat: leave --env-backend out"
        )
