"""CartPole in which something goes wrong, once, in one environment of one process."""

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from tensorboard.summary.writer.event_file_writer import _AsyncWriter

Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


def fail() -> None:
    raise ValueError("the pole\nis broken")


def have_a_signal_come_as_the_log_has_taken_a_lock(step: Step) -> Step:
    flush = _AsyncWriter.flush

    def flush_after_a_signal(writer: _AsyncWriter) -> None:
        writer._lock.acquire()
        signal.raise_signal(signal.SIGTERM)  # an exception, here, leaves the lock taken for ever
        writer._lock.release()
        flush(writer)

    _AsyncWriter.flush = flush_after_a_signal
    return step


# What a step that goes wrong returns instead of what it should.
FAULTS: dict[str, Callable[[Step], Step | None]] = {
    "nan_observation": lambda step: (step[0] * np.nan, *step[1:]),
    "infinite_observation": lambda step: (step[0] + np.inf, *step[1:]),
    "nan_final_observation": lambda step: (step[0] * np.nan, step[1], False, True, {}),
    "nan_reward": lambda step: (step[0], np.nan, *step[2:]),
    "infinite_reward": lambda step: (step[0], -np.inf, *step[2:]),
    "huge_reward": lambda step: (step[0], 1e30, *step[2:]),  # its square is no float32
    "raises": lambda step: fail(),
    "raises_in_reset": lambda step: (*step[:2], True, False, {}),
    "exits": lambda step: sys.exit(0),
    "exits_at_once": lambda step: os._exit(0),
    "signal_in_the_log": have_a_signal_come_as_the_log_has_taken_a_lock,
    "hangs": lambda step: time.sleep(1e6),
}


class FaultyEnv(CartPoleEnv):
    """Goes wrong in one step.

    Args:
        fault: what goes wrong, see `FAULTS`.
        rank: of the process where it goes wrong.
        index: of the environment there.
        step: of all that this environment has taken, whatever the episode, counted from 0.
    """

    reset_before = count()  # counts the environments of this process when they are reset first

    def __init__(
        self, fault: str, rank: int = 0, index: int = 0, step: int = 0, render_mode: str | None = None
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.fault, self.place, self.fatal_step = fault, (rank, index), step
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        if self.steps == 0:
            self.is_faulty = (int(os.environ["RANK"]), next(self.reset_before)) == self.place
        elif self.fault == "raises_in_reset" and self.is_faulty and self.steps == self.fatal_step + 1:
            fail()
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> Step:
        step = super().step(action)
        if self.is_faulty and self.steps == self.fatal_step:
            step = FAULTS[self.fault](step)
        self.steps += 1
        return step


gym.register("Faulty-v0", entry_point="tests.faulty_env:FaultyEnv")
