"""Environments that can be put back exactly where they were.

Few environments can be copied or pickled (a Box2D world loses its state without a word), but all deterministic ones
can be replayed: a reset with the same seed, then the same actions. So that is what a checkpoint holds.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl.seeding import episode_seed
from rl.voice import RunError

# The usual types of a reward; others are looked at, which takes longer.
NUMBERS = frozenset({float, int, bool, np.float64, np.float32, np.int64, np.bool_})
LEAST_ROOM = 1000  # vector steps, after which those that no running episode needs are dropped
LONGEST_REPLAY = 100_000  # steps; of a longer episode the actions are not kept, and a resume begins a new one instead
LARGEST_NUMBER = 1e300
MARKS = 3  # ends of rollouts that are remembered: up to two rollouts may be ahead of the update that a checkpoint is of


class ReplayableEnv(gym.Wrapper):
    """An environment of which the same seed makes the same episode; the outermost wrapper."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.step = env.step  # type: ignore[method-assign]  # nothing to add, so no layer that every step must pass

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, in a new world."""
        _renew_world(self.unwrapped)
        return self.env.reset(seed=seed, options=options)

    def numbers(self) -> dict[str, float]:
        """Return the plain numbers that the environment keeps, by the names of its attributes."""
        values = {
            name: value.item() if isinstance(value, np.integer | np.floating) else value
            for name, value in vars(self.unwrapped).items()
        }
        return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and abs(v) < LARGEST_NUMBER}


class Mark(NamedTuple):
    """Where N environments stood at the end of a rollout."""

    num_steps: int  # vector steps so far
    first: np.ndarray  # the step with which the running episode of each began, [N]
    episodes: np.ndarray  # the number of the running episode of each, [N]
    returns: np.ndarray  # its sum of rewards so far, [N]
    observations: np.ndarray  # [N, *shape]
    numbers: list[dict[str, float]]  # those that each keeps


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

    `info["life_lost"]` names those that lost a life, where `LifeLoss` says so.

    Every episode has a seed of its own, from a stream of its environment. So an episode can be repeated even where an
    environment makes its generator of random numbers only when it is given a seed.

    A step of a small environment takes a third less time than in Gymnasium's own classes. And this one remembers the
    actions of the running episodes, and says which environment fails.

    Args:
        make_env: a function for each environment.
    """

    envs: list[ReplayableEnv]  # type: ignore[assignment]

    def __init__(self, make_env: Sequence[Callable[[], ReplayableEnv]]) -> None:
        super().__init__(make_env, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        batched = cast("Box", self.observation_space)
        self.observations: np.ndarray = np.zeros(batched.shape, dtype=batched.dtype)
        self.action_shape = cast("tuple[int, ...]", self.action_space.shape)
        self.shape = self.observations.shape[1:]  # of one observation
        self.length = self.shape[0] if len(self.shape) == 1 else None  # tells vectors apart, faster than the shape
        self.rewards = np.zeros(self.num_envs)
        self.terminations = np.zeros(self.num_envs, dtype=bool)
        self.truncations = np.zeros(self.num_envs, dtype=bool)
        self.episode_returns = np.zeros(self.num_envs)
        self.marks: dict[int, Mark] = {}
        self.action_dtype = _smallest_dtype(self.single_action_space)
        self._forget(num_steps=0)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps of the running episodes, [N]."""
        return self.num_steps - self.first

    def reset(  # type: ignore[override]  # each environment has a seed
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all environments; the array of observations is used again by each step.

        Args:
            seed: one for each environment, from which the seeds of its episodes derive.
            options: of the environments.
        """
        self.seeds = (
            list(seed) if isinstance(seed, Sequence) else [(seed or 0) + index for index in range(self.num_envs)]
        )
        for index in range(self.num_envs):
            self._begin_episode(index, 0, " in a reset", options)
        return self.observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments; the array of observations is used again by the next step."""
        if self.num_steps - self.kept_from == len(self.actions):
            self._make_room()
        self.actions[self.num_steps - self.kept_from] = actions
        self.num_steps += 1
        final_observations: dict[int, np.ndarray] = {}
        losers: list[int] = []
        length = self.length
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            try:
                observation, reward, terminated, truncated, said = env.step(action)
                if said and said.get("life_lost"):
                    losers.append(index)
                if type(reward) not in NUMBERS or len(observation) != length:
                    _check(observation, reward, self.shape)
                self.rewards[index] = reward
                self.terminations[index] = terminated
                self.truncations[index] = truncated
                if terminated or truncated:
                    final_observations[index] = np.array(observation)  # the next episode may write into the same array
                else:
                    self.observations[index] = observation
            except (Exception, SystemExit) as error:
                raise _failure(index, error) from error
        self.episode_returns += self.rewards
        info = self._end_episodes(final_observations) if final_observations else {}
        if losers:
            info["life_lost"] = losers
        return self.observations, self.rewards.copy(), self.terminations.copy(), self.truncations.copy(), info

    def mark(self, update: int) -> None:
        """Remember where the environments stand, at the end of the rollout for an update."""
        now = Mark(
            self.num_steps,
            self.first.copy(),
            self.episodes.copy(),
            self.episode_returns.copy(),
            self.observations.copy(),
            [env.numbers() for env in self.envs],
        )
        self.marks = dict([*self.marks.items(), (update, now)][-MARKS:])

    def states(self, update: int) -> list[dict[str, Any]]:
        """Return what each environment needs to be put back where it stood at a mark: arrays and plain values.

        Where an episode is longer than `LONGEST_REPLAY`, there are no actions.
        """
        mark = self.marks[update]
        states = []
        for index, first in enumerate(mark.first):
            state: dict[str, Any] = {"seed": self.seeds[index], "episode": int(mark.episodes[index])}
            if first >= max(self.kept_from, mark.num_steps - LONGEST_REPLAY):
                state |= {
                    "actions": self.actions[first - self.kept_from : mark.num_steps - self.kept_from, index],
                    "observation": mark.observations[index],
                    "return": float(mark.returns[index]),
                    "numbers": mark.numbers[index],
                }
            states.append(state)
        return states

    def restore(self, states: list[dict[str, Any]]) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
        """Put the environments back where they were.

        One that does not repeat its episode begins the next one.

        Args:
            states: of each environment, from `states`.

        Returns:
            The observations [N, *shape], the rewards of each running episode so far, and a line for each environment
            that is not exactly where it was.
        """
        rewards: list[np.ndarray] = []
        notes: list[str] = []
        self.seeds = [state["seed"] for state in states]
        # The actions are laid out so that all environments end at the same vector step.
        self._forget(num_steps=max(len(state.get("actions", ())) for state in states))
        for index, state in enumerate(states):
            difference, replayed = self._replay(index, state)
            if difference:
                notes.append(f"environment {index} {difference}")
                self._begin_episode(index, state["episode"] + 1, " in a reset")
            elif kept := _changed(state["numbers"], self.envs[index].numbers()):
                notes.append(
                    f"environment {index} keeps {', '.join(kept)} across episodes, which a replay cannot restore"
                )
            self.first[index] = self.num_steps - len(replayed)
            rewards.append(replayed)
        return self.observations, rewards, notes

    def _replay(self, index: int, state: dict[str, Any]) -> tuple[str, np.ndarray]:
        """Repeat an episode up to where it stood; return in what it differs, else its rewards [steps]."""
        if "actions" not in state:
            return "was in an episode too long to be repeated", np.zeros(0)
        actions = state["actions"].astype(self.action_space.dtype)
        rewards = np.zeros(len(actions))
        self._begin_episode(index, state["episode"], " in a reset")
        try:
            self.actions[self.num_steps - len(actions) : self.num_steps, index] = actions
            for step, action in enumerate(actions):
                observation, rewards[step], terminated, truncated, _ = self.envs[index].step(action)
                self.observations[index] = observation
                self.episode_returns[index] += rewards[step]
                if terminated or truncated:
                    return "does not repeat its episode: it ends early", np.zeros(0)
        except (Exception, SystemExit) as error:
            return f"does not repeat its episode: {_failure(index, error)}", np.zeros(0)
        if not np.array_equal(self.observations[index], state["observation"]):
            return "does not repeat its observations", np.zeros(0)
        if self.episode_returns[index] != state["return"]:
            return "does not repeat its rewards", np.zeros(0)
        return "", rewards

    def _begin_episode(self, index: int, episode: int, when: str = "", options: dict[str, Any] | None = None) -> None:
        """Reset an environment with the seed of one of its episodes; a failure says `when` it happened."""
        seed = episode_seed(self.seeds[index], int(episode))
        try:
            observation, _ = self.envs[index].reset(seed=seed, options=options)
            _check(observation, 0.0, self.shape)
            self.observations[index] = observation
        except (Exception, SystemExit) as error:
            raise _failure(index, error, when) from error
        self.episodes[index] = episode
        self.episode_returns[index] = 0
        self.first[index] = self.num_steps

    def _end_episodes(self, final_observations: dict[int, np.ndarray]) -> dict[str, Any]:
        """Reset the environments whose episodes ended; return the info of the step."""
        ended = self.terminations | self.truncations
        finals = np.full(self.num_envs, None, dtype=object)
        statistics = {"r": np.where(ended, self.episode_returns, 0), "l": np.where(ended, self.episode_lengths, 0)}
        for index, observation in final_observations.items():
            finals[index] = observation
            self._begin_episode(index, self.episodes[index] + 1)
        return {"final_obs": finals, "_final_obs": ended, "episode": statistics, "_episode": ended}

    def _forget(self, num_steps: int) -> None:
        """Forget all actions and marks, and begin to count after `num_steps` vector steps."""
        self.num_steps, self.kept_from = num_steps, 0
        self.actions = np.zeros((num_steps + LEAST_ROOM, *self.action_shape), dtype=self.action_dtype)
        self.first = np.full(self.num_envs, num_steps)
        self.episodes = np.zeros(self.num_envs, dtype=np.int64)
        self.marks = {}

    def _make_room(self) -> None:
        """Drop the actions that no state needs, and make room for more."""
        needed = min([self.first.min(), *(mark.first.min() for mark in self.marks.values())])
        needed = max(needed, self.num_steps - LONGEST_REPLAY, self.kept_from)
        kept = self.actions[needed - self.kept_from : self.num_steps - self.kept_from]
        room = np.zeros((max(len(kept), LEAST_ROOM), *self.action_shape), dtype=kept.dtype)
        self.actions, self.kept_from = np.concatenate([kept, room]), needed


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


def _smallest_dtype(space: gym.Space) -> np.dtype:
    """Return the smallest type that holds every action of a space."""
    if isinstance(space, Discrete | MultiDiscrete):
        count = space.n if isinstance(space, Discrete) else space.nvec
        return np.promote_types(
            np.min_scalar_type(np.min(space.start)), np.min_scalar_type(np.max(space.start + count - 1))
        )
    return np.dtype(space.dtype)


def _changed(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return the names of the numbers that are not what they were."""
    return sorted(name for name, number in before.items() if after.get(name) != number)


def _renew_world(env: Any) -> None:
    """Give an environment that uses its Box2D world again (BipedalWalker, CarRacing) a new one.

    In a used world the order of contacts, and so the last bits of an episode, depends on the episodes before.
    """
    world = getattr(env, "world", None)
    if world is None or not hasattr(env, "_destroy"):
        return
    env._destroy()
    env.world = type(world)(gravity=world.gravity, contactListener=getattr(env, "contactListener_keepref", None))
