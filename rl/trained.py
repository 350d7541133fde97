"""A trained agent for notebooks and programs, in two lines:

agent = TrainedAgent("logs/torch_logs/RUN")
action = agent.act(observation)
"""

import operator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rl.run.resuming import load_agent
from rl.spaces import stored_dtype, stored_space


class TrainedAgent:
    """The agent of a run, with its statistics of normalisation.

    Args:
        run_or_checkpoint: a run's folder, whose last checkpoint is taken, or a checkpoint.
        seed: of the actions that are sampled.

    Raises:
        ValueError: with one line, if there is no checkpoint, it cannot be read, or its environment cannot be made.
    """

    def __init__(self, run_or_checkpoint: str | Path, seed: int = 0) -> None:
        self.agent, self.args = load_agent(Path(run_or_checkpoint))
        self.space = self.agent.observation_space
        self.rng = np.random.default_rng(seed)

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = True) -> Any:
        """Return the action for an observation as the environment gives it, or the actions for an array of them.

        Args:
            observation: one of the environment's space, or an array [B, *shape] where the space is a Box.
            deterministic: take the greedy action instead of sampling one.

        Raises:
            ValueError: if the observation does not fit the space.
        """
        is_single, shape = True, stored_space(self.space).shape
        if isinstance(self.space, gym.spaces.Box):
            array = np.asarray(observation)
            is_single = array.shape == self.space.shape
            if not is_single and array.shape[1:] != self.space.shape:
                raise ValueError(f"observations of shape {array.shape} are none of {self.space}, and no array of such")
        else:
            try:
                if isinstance(self.space, gym.spaces.Discrete):
                    observation = operator.index(observation)  # Gymnasium takes several states for one
                array = np.asarray(gym.spaces.flatten(self.space, observation)).reshape(shape)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the observation {observation!r} is none of {self.space}") from error
        rows = array.reshape(-1, *shape)
        dtype = getattr(torch, stored_dtype(self.space))
        observed = self.agent.observation_normalizer(torch.tensor(rows, dtype=dtype))
        if deterministic:
            actions = self.agent.act_greedily(observed)
        else:
            noise = self.agent.distribution.draw_noise(self.rng, len(rows))
            actions = self.agent.act(observed, torch.from_numpy(noise))
        chosen = self.agent.distribution.to_env(actions).numpy()
        return chosen[0] if is_single else chosen
