"""The agent as a LightningModule, for the scripts with Fabric."""

import logging
import warnings

import gymnasium as gym
import torch
from lightning import LightningModule

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import Losses, ppo_loss

# A normal run is quiet: of processes that meet, of what Fabric 2.6 calls and PyTorch 2.13 deprecates, and of the stream
# of its own on which Fabric wraps a module for a GPU.
for package in ("lightning.fabric", "lightning.pytorch"):
    logging.getLogger(package).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


class LightningAgent(Agent, LightningModule):
    """The same agent, with the step that Fabric sends through the wrapped module."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: CommonArgs) -> None:
        super().__init__(observation_space, action_space, args)
        self.args = args

    def training_step(self, minibatch: Batch, mean_rows: float) -> Losses:  # type: ignore[override]
        """Return the loss of a minibatch, see `ppo_loss`."""
        return ppo_loss(self, minibatch, mean_rows, self.args)
