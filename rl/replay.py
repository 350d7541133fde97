"""Environments that can be put back exactly where they were.

Few environments can be copied or pickled (a Box2D world loses its state without a word), but all deterministic ones
can be replayed: a reset from the same random state, then the same actions. So that is what a checkpoint holds.
"""

import traceback
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from rl.launch import RunError

FORGET_EVERY = 1000  # vector steps, after which those that no running episode needs are dropped


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


class ReplayableEnvs(VectorWrapper):
    """N environments that remember the actions of their running episodes, and say which of them fails."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.actions: list[np.ndarray] = []  # of all environments, vector step by vector step
        self.first = np.zeros(self.num_envs, dtype=np.int64)  # where in them each running episode began

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all environments."""
        self.actions.clear()
        self.first[:] = 0
        try:
            return self.env.reset(**kwargs)
        except (Exception, SystemExit) as error:
            raise self._failure(error) from error

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments."""
        self.actions.append(np.array(actions))
        try:
            results = self.env.step(actions)
        except (Exception, SystemExit) as error:
            raise self._failure(error) from error
        if "final_obs" in results[-1]:
            self.first[results[-1]["_final_obs"]] = len(self.actions)
        if len(self.actions) % FORGET_EVERY == 0:
            unused = self.first.min()
            del self.actions[:unused]
            self.first -= unused
        return results

    def state(self, observations: np.ndarray) -> list[dict[str, Any]]:
        """Return what each environment needs to be put back: arrays and plain values only.

        Args:
            observations: [N, *shape], where the environments are; a replay must lead there.
        """
        return [
            {
                "start": env.start,
                "actions": np.array([actions[index] for actions in self.actions[self.first[index] :]]),
                "observation": np.array(observations[index]),
                "episode_return": float(self.env.episode_returns[index]),
                "episode_length": int(self.env.episode_lengths[index]),
            }
            for index, env in enumerate(self.unwrapped.envs)
        ]

    def restore(self, states: list[dict[str, Any]]) -> np.ndarray:
        """Put the environments back where they were and return their observations [N, *shape].

        Raises:
            ValueError: if a replay leads elsewhere, because the environment is not deterministic.
        """
        observations = []
        for index, (env, state) in enumerate(zip(self.unwrapped.envs, states, strict=True)):
            observation = np.asarray(env.replay(state["start"], state["actions"]))
            expected = state["observation"]
            if not np.array_equal(observation.astype(expected.dtype), expected):
                raise ValueError(f"environment {index} does not repeat its episode: it is not deterministic")
            observations.append(expected)
            self.env.episode_returns[index] = state["episode_return"]
            self.env.episode_lengths[index] = state["episode_length"]
        # The actions are laid out so that all environments end at the same vector step.
        lengths = np.array([len(state["actions"]) for state in states])
        self.first = lengths.max() - lengths
        shape = self.action_space.shape
        self.actions = list(np.zeros((lengths.max(), *shape), dtype=self.action_space.dtype))
        for index, state in enumerate(states):
            for step, action in enumerate(state["actions"], start=self.first[index]):
                self.actions[step][index] = action
        return np.stack(observations)

    def _failure(self, error: BaseException) -> EnvironmentFailure:
        """Find the environment that raised the error by what runs in the frames of its traceback."""
        running = {id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)}
        owners = (index for index, env in enumerate(self.unwrapped.envs) if {id(env), id(env.env)} & running)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        return EnvironmentFailure(f"environment {next(owners, '')}".strip(), reason)


def _renew_world(env: gym.Env) -> None:
    """Give an environment that uses its Box2D world again (BipedalWalker, CarRacing) a new one.

    In a used world the order of contacts, and so the last bits of an episode, depends on the episodes before.
    """
    world = getattr(env, "world", None)
    if world is None or not hasattr(env, "_destroy"):
        return
    env._destroy()
    env.world = type(world)(gravity=world.gravity, contactListener=getattr(env, "contactListener_keepref", None))
