"""The agent as a LightningModule, for the scripts with Fabric."""

from typing import Any

from lightning import LightningModule

from rl.agent import Agent
from rl.args import CommonArgs
from rl.loss import Losses, ppo_loss
from rl.minibatch import Batch


class LightningAgent(Agent, LightningModule):
    """The same agent, with the step that Fabric sends through the wrapped module.

    Args:
        args: what the loss needs.
        agent_args: what `Agent` needs.
    """

    def __init__(self, args: CommonArgs, *agent_args: Any) -> None:
        super().__init__(*agent_args)
        self.args = args

    def training_step(self, minibatch: Batch, rows: float) -> Losses:
        """Return the loss of a minibatch, see `ppo_loss`."""
        return ppo_loss(self, minibatch, rows, self.args)
