"""EnvPool's environments, with the meaning that Gymnasium's have here: an episode's end resets in the same step."""

from typing import Any

import envpool
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rl.args import EnvironmentArgs
from rl.spaces import stored_space


class EnvPoolEnvs(VectorEnv):
    """N environments of EnvPool in one thread.

    EnvPool alone would answer the step after an episode's end with the reset, whatever the action: a transition that
    never was. So those environments are stepped once more at once, and their final observations handed on apart.

    Args:
        args: `env_id` counts here.
        num_envs: N.
        observation_space: of one environment.
        action_space: of one environment.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (so declared by Gymnasium)

    def __init__(
        self, args: EnvironmentArgs, num_envs: int, observation_space: gym.Space, action_space: gym.Space
    ) -> None:
        self.env_id = args.env_id
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space, self.action_space = (
            batch_space(observation_space, num_envs),
            batch_space(action_space, num_envs),
        )
        self.action_dtype = np.float32 if isinstance(action_space, gym.spaces.Box) else np.int32

    def reset(self, *, seed: list[int], options: None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Make the environments with these seeds, one each, and return their first observations [N, *shape]."""
        self.pool = envpool.make(
            self.env_id, env_type="gymnasium", num_envs=self.num_envs, num_threads=1, env_seed=list(seed)
        )
        observations, _ = self.pool.reset()
        return observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations [N, *shape], rewards, terminations, truncations, each [N], and the final observations."""
        actions = actions.astype(self.action_dtype)
        observations, rewards, terminations, truncations, _ = self.pool.step(actions)
        ended = np.flatnonzero(terminations | truncations)
        if not len(ended):
            return observations, rewards, terminations, truncations, {}
        final_observations = np.full(self.num_envs, None, dtype=object)
        for env in ended:
            final_observations[env] = observations[env].copy()
        observations[ended] = self.pool.step(actions[ended], ended.astype(np.int32))[0]
        info = {"final_obs": final_observations, "_final_obs": terminations | truncations}
        return observations, rewards, terminations, truncations, info

    def state(self, observations: np.ndarray) -> list[dict[str, Any]]:
        """Return nothing for each environment: EnvPool does not let its random state be read."""
        return [{} for _ in range(self.num_envs)]

    def restore(self, states: list[dict[str, Any]]) -> np.ndarray:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("EnvPool's environments cannot be put back where they were")

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
