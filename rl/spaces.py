"""Spaces: the one place that decides which are supported and what becomes of them.

An observation reaches the learner as one array: an image as it is, everything else flat, float32, part after part.
To support another space, describe it here, and add its module to `rl/ppo/encoders.py` or `rl/ppo/distributions.py`.
"""

import math
from typing import NamedTuple, TypeGuard, cast

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

SMALLEST_IMAGE = 7  # MiniGrid's; what is smaller is a table of numbers
SMALLEST_GREY_IMAGE = 36  # without an axis of channels
MOST_CHANNELS = 16  # a stack of frames; an axis that is longer holds no channels
IMAGE_FEATURES = 256  # what the convolutions make of one image


class Image(NamedTuple):
    """An image: [height, width, channels], [channels, height, width] or [height, width]."""

    shape: tuple[int, ...]
    low: float  # its values are mapped from low..high to 0..1
    high: float

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Vector(NamedTuple):
    """Numbers in no order that matters: a flat Box, or one-hot codes."""

    size: int


def observation_parts(space: gym.Space) -> list[Image | Vector]:
    """Return the parts of an observation in the order in which Gymnasium flattens them.

    Raises:
        ValueError: if the space, or one inside it, is not supported.
    """
    if isinstance(space, Dict):
        return [part for inner in space.spaces.values() for part in observation_parts(inner)]
    if isinstance(space, Tuple):
        return [part for inner in space.spaces for part in observation_parts(inner)]
    if is_image(space):
        low, high = float(space.low.min()), float(space.high.max())
        return [Image(space.shape, low, high) if math.isfinite(high - low) else Image(space.shape, 0.0, 1.0)]
    if isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        return [Vector(gym.spaces.flatdim(space))]
    raise ValueError(
        f"the observation space {_in_one_line(space)} is not supported; supported are Box (vectors and images), "
        "Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"
    )


def is_image(space: gym.Space) -> TypeGuard[Box]:
    """Whether a space is a Box with two long axes and, before or after them, at most a short one of channels."""
    if not isinstance(space, Box) or len(space.shape) not in (2, 3):
        return False
    if len(space.shape) == 2:
        return space.dtype == np.uint8 and min(space.shape) >= SMALLEST_GREY_IMAGE
    first, middle, last = space.shape
    return min(first, last) <= MOST_CHANNELS and min(max(first, last), middle) >= SMALLEST_IMAGE


def has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the channels of an image are the last of its three axes: the shorter one of the first and the last."""
    return shape[-1] <= shape[0]


def stored_space(space: gym.Space) -> Box:
    """Return the space of the observations that reach the learner: an image as it is, everything else flat."""
    return space if is_image(space) else cast("Box", gym.spaces.flatten_space(space))


def stored_dtype(space: gym.Space) -> str:
    """Return the type of the observations that reach the learner: bytes in images that hold no more, else "float32"."""
    return "uint8" if is_image(space) and space.dtype in (np.uint8, np.bool_) else "float32"


def check_action_space(space: gym.Space) -> None:
    """Check that actions of this space can be learnt.

    Raises:
        ValueError: if not.
    """
    if isinstance(space, Discrete | MultiDiscrete | MultiBinary):
        return
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return
    raise ValueError(
        f"the action space {_in_one_line(space)} is not supported; supported are Discrete, MultiDiscrete, MultiBinary "
        "and Box of floating-point numbers"
    )


def _in_one_line(space: gym.Space) -> str:
    return " ".join(str(space).split())
