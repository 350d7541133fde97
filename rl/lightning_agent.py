"""The agent as a LightningModule, for the scripts with Fabric."""

import logging

import gymnasium as gym
from lightning import LightningModule

from rl.agent import Agent
from rl.args import CommonArgs
from rl.loss import Losses, ppo_loss
from rl.minibatch import Batch

logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # a normal run is quiet


class LightningAgent(Agent, LightningModule):
    """The same agent, with the step that Fabric sends through the wrapped module."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete, args: CommonArgs) -> None:
        super().__init__(observation_space, action_space, args)
        self.args = args

    def training_step(self, minibatch: Batch, rows: float) -> Losses:
        """Return the loss of a minibatch, see `ppo_loss`."""
        return ppo_loss(self, minibatch, rows, self.args)
