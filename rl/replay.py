"""Environments that can be put back exactly where they were.

Few environments can be copied or pickled (a Box2D world loses its state without a word), but all deterministic ones
can be replayed: a reset from the same random state, then the same actions. So that is what a checkpoint holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl.launch import RunError

# The usual types of a reward; others are looked at, which takes longer.
NUMBERS = frozenset({float, int, bool, np.float64, np.float32, np.int64, np.bool_})
LEAST_ROOM = 1000  # vector steps, after which those that no running episode needs are dropped


class ReplayableEnv(gym.Wrapper):
    """Remembers what its last reset started from; the outermost wrapper of an environment."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.step = env.step  # nothing to add, so no layer that every step must pass

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and remember the seed, or else the random state before."""
        self.start = {"state": self.unwrapped.np_random.bit_generator.state} if seed is None else {"seed": seed}
        _renew_world(self.unwrapped)
        return self.env.reset(seed=seed, options=options)

    def replay(self, start: dict[str, Any], actions: np.ndarray) -> Any:
        """Repeat an episode up to now and return the observation that it led to.

        Args:
            start: what `self.start` was.
            actions: those since then, [steps, ...].
        """
        if "state" in start:
            bits = getattr(np.random, start["state"]["bit_generator"])()
            bits.state = start["state"]
            self.unwrapped.np_random = np.random.Generator(bits)
        observation, _ = self.reset(seed=start.get("seed"))
        for action in actions:
            observation, *_ = self.env.step(action)
        return observation


class EnvironmentFailure(RunError):
    """An environment raised an error, or wanted to end the process."""

    def __init__(self, who: str, reason: str, when: str = "") -> None:
        super().__init__(f"{who} failed{when}: {reason}")
        self.who = who
        self.reason = reason


class ReplayableEnvs(SyncVectorEnv):
    """N environments that step together, one after the other in this process.

    The step that ends an episode also resets its environment (SAME_STEP). It returns the new episode's first
    observation; `info` then holds the final one, and the episode's return and length as RecordEpisodeStatistics
    names them. Gymnasium's default would insert a step that ignores the action, which must not be learnt from.

    A step of a small environment takes a third less time than in Gymnasium's own classes. And this one remembers the
    actions of the running episodes, and says which environment fails.

    Args:
        make_env: a function for each environment.
    """

    def __init__(self, make_env: Sequence[Callable[[], ReplayableEnv]]) -> None:
        super().__init__(make_env, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self.observations = np.zeros(self.observation_space.shape, dtype=self.observation_space.dtype)
        self.shape = self.observations.shape[1:]  # of one observation
        self.length = self.shape[0] if len(self.shape) == 1 else None  # tells vectors apart, faster than the shape
        self.rewards = np.zeros(self.num_envs)
        self.terminations = np.zeros(self.num_envs, dtype=bool)
        self.truncations = np.zeros(self.num_envs, dtype=bool)
        self.episode_returns = np.zeros(self.num_envs)
        self.episode_lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._keep(np.zeros((0, *self.action_space.shape), dtype=self.action_space.dtype), self.episode_lengths.copy())

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all environments, each with its own seed; the array of observations is used again by each step."""
        if not isinstance(seed, Sequence):
            seed = [None if seed is None else seed + index for index in range(self.num_envs)]
        for index, (env, env_seed) in enumerate(zip(self.envs, seed, strict=True)):
            try:
                observation, _ = env.reset(seed=env_seed, options=options)
                _check(observation, 0.0, self.shape)
                self.observations[index] = observation
            except (Exception, SystemExit) as error:
                raise _failure(index, error, " in a reset") from error
        self.episode_returns[:] = 0
        self.episode_lengths[:] = 0
        self.first[:] = self.num_steps
        return self.observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments; the array of observations is used again by the next step."""
        if self.num_steps == len(self.actions):
            oldest = self.first.min()
            self._keep(self.actions[oldest:], self.first - oldest)
        self.actions[self.num_steps] = actions
        self.num_steps += 1
        final_observations: dict[int, np.ndarray] = {}
        shape, length = self.shape, self.length
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            try:
                observation, reward, terminated, truncated, _ = env.step(action)
                if type(reward) not in NUMBERS or len(observation) != length:
                    _check(observation, reward, shape)
                if terminated or truncated:
                    final_observations[index] = observation
                    observation, _ = env.reset()
                    _check(observation, reward, shape)
                self.observations[index] = observation
                self.rewards[index] = reward
            except (Exception, SystemExit) as error:
                raise _failure(index, error) from error
            self.terminations[index] = terminated
            self.truncations[index] = truncated
        self.episode_returns += self.rewards
        self.episode_lengths += 1
        info = self._end_episodes(final_observations) if final_observations else {}
        return self.observations, self.rewards.copy(), self.terminations.copy(), self.truncations.copy(), info

    def _end_episodes(self, final_observations: dict[int, np.ndarray]) -> dict[str, Any]:
        """Return the info of a step that ended episodes, and begin to count anew."""
        ended = self.terminations | self.truncations
        finals = np.full(self.num_envs, None, dtype=object)
        for index, observation in final_observations.items():
            finals[index] = observation
        statistics = {"r": np.where(ended, self.episode_returns, 0), "l": np.where(ended, self.episode_lengths, 0)}
        self.episode_returns[ended] = 0
        self.episode_lengths[ended] = 0
        self.first[ended] = self.num_steps
        return {"final_obs": finals, "_final_obs": ended, "episode": statistics, "_episode": ended}

    def state(self, observations: np.ndarray) -> list[dict[str, Any]]:
        """Return what each environment needs to be put back: arrays, which hold until the next step, and plain values.

        Args:
            observations: [N, *shape], where the environments are; a replay must lead there.
        """
        return [
            {
                "start": env.start,
                "actions": self.actions[self.first[index] : self.num_steps, index],
                "observation": observations[index],
                "episode_return": float(self.episode_returns[index]),
                "episode_length": int(self.episode_lengths[index]),
            }
            for index, env in enumerate(self.envs)
        ]

    def restore(self, states: list[dict[str, Any]]) -> np.ndarray:
        """Put the environments back where they were and return their observations [N, *shape].

        Raises:
            ValueError: if a replay leads elsewhere, because the environment is not deterministic.
        """
        # The actions are laid out so that all environments end at the same vector step.
        lengths = np.array([len(state["actions"]) for state in states])
        actions = np.zeros((lengths.max(), *self.action_space.shape), dtype=self.action_space.dtype)
        self._keep(actions, lengths.max() - lengths)
        for index, (env, state) in enumerate(zip(self.envs, states, strict=True)):
            self.actions[self.first[index] : self.num_steps, index] = state["actions"]
            observation = np.asarray(env.replay(state["start"], state["actions"]))
            self.observations[index] = state["observation"]
            if not np.array_equal(observation.astype(self.observations.dtype), self.observations[index]):
                raise ValueError(f"environment {index} does not repeat its episode: it is not deterministic")
            self.episode_returns[index] = state["episode_return"]
            self.episode_lengths[index] = state["episode_length"]
        return self.observations

    def _keep(self, actions: np.ndarray, first: np.ndarray) -> None:
        """Remember these actions of the last vector steps, and make room for more.

        Args:
            actions: [steps, N, ...].
            first: the step with which the running episode of each environment began, [N].
        """
        room = np.zeros((max(len(actions), LEAST_ROOM), *self.action_space.shape), dtype=self.action_space.dtype)
        self.actions = np.concatenate([actions, room])
        self.num_steps = len(actions)  # of those in the array
        self.first = first


def _failure(index: int, error: BaseException, when: str = "") -> EnvironmentFailure:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return EnvironmentFailure(f"environment {index}", reason, when)


def _check(observation: Any, reward: Any, shape: tuple[int, ...]) -> None:
    """Check what an environment returned. NumPy would spread one number over the whole row, and read a text.

    Raises:
        TypeError: if the observation has another shape than was declared, or the reward is no number.
    """
    if np.shape(observation) != shape:
        raise TypeError(f"the observation has shape {np.shape(observation)}, not {shape}")
    if np.shape(reward) or np.asarray(reward).dtype.kind not in "biuf":
        raise TypeError(f"the reward is {reward!r}, no number")


def _renew_world(env: gym.Env) -> None:
    """Give an environment that uses its Box2D world again (BipedalWalker, CarRacing) a new one.

    In a used world the order of contacts, and so the last bits of an episode, depends on the episodes before.
    """
    world = getattr(env, "world", None)
    if world is None or not hasattr(env, "_destroy"):
        return
    env._destroy()
    env.world = type(world)(gravity=world.gravity, contactListener=getattr(env, "contactListener_keepref", None))
