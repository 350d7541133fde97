"""Random streams: each is derived from the seed and from what it is for, none from another's state."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random stream is for. Streams of different purposes are independent."""

    NETWORK = 0  # initial weights, the same on all ranks
    ENVIRONMENT = 1  # one per environment, over all ranks
    ACTION = 2  # one per environment and update
    SHUFFLE = 3  # one per update and epoch, and per rank unless the ranks share data
    SCATTER = 4  # one per update: how the player deals the batch out
    TEST = 5  # one per test episode
    EVALUATION = 6  # one per episode of the evaluations during training


def stream(seed: int, purpose: Purpose, *index: int) -> np.random.Generator:
    """Return the random stream of `seed` for a purpose and an index such as (update, epoch, rank).

    A stream is a function of its arguments alone, so nothing has to be stored to repeat or to resume a run
    (`numpy.random.SeedSequence`, whose spawn keys make the streams independent).
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *index)))


def stream_seed(seed: int, purpose: Purpose, *index: int) -> int:
    """Return the first number of a stream, for what takes a seed below 2**31 instead of a generator."""
    return int(stream(seed, purpose, *index).integers(2**31))


def episode_seed(environment_seed: int, episode: int) -> int:
    """Return the seed of an episode, below 2**31: that of its environment for episode 0, for others derived from it."""
    if episode == 0:
        return environment_seed
    return int(np.random.SeedSequence(environment_seed, spawn_key=(episode,)).generate_state(1)[0] >> 1)
