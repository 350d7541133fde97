"""The channel between the player and the trainers: three messages, each send directly above its receive."""

from datetime import timedelta

import torch
from lightning.fabric.plugins.collectives import TorchCollective
from torch import Tensor, nn
from torch.optim import Optimizer

from rl.args import DecoupledArgs
from rl.ppo.batch import Batch
from rl.ppo.metrics import NUM_LOSS_SUMS
from rl.ppo.minibatches import almost_equal_sizes
from rl.processes.agreement import check_agreement, weights_checksum
from rl.seeding import Purpose, stream

PLAYER = 0
LEAD_TRAINER = 1
ROWS_AT_ONCE = 512  # that are packed at once, which bounds the memory


class Channel:
    """Owns the groups of processes and the order in which they talk.

        player (rank 0)                               trainers (ranks 1..N)
                  ---- 1. batch, a share each ----->  every trainer
                  <--- 2. losses -------------------  lead trainer (rank 1)
                  <--- 3. weights, Adam's state ----  lead trainer

    Both sides know the shape and the type of every message, so only tensors travel, and nothing is pickled. They
    travel on the CPU, with gloo, wherever they come from.

    Args:
        args: `timeout`, `seed` and `share_data` count here.
        backend: of the trainers among themselves; gloo if any process says so.
    """

    def __init__(self, args: DecoupledArgs, backend: str) -> None:
        self.args = args
        # Every process creates every group, in the same order, whether it belongs to it or not. A group does not
        # inherit the time that it waits.
        patience = timedelta(seconds=args.timeout)
        self.everyone = TorchCollective().setup(backend="gloo", timeout=patience)
        self.rank, self.world_size = self.everyone.rank, self.everyone.world_size
        self.num_trainers = self.world_size - 1
        shared_gpus = self.everyone.all_reduce(torch.tensor(int(backend == "gloo")))  # on any machine
        backend = "gloo" if shared_gpus or self.num_trainers == 1 else backend
        self.lead_and_player = TorchCollective().create_group(
            ranks=[PLAYER, LEAD_TRAINER], backend="gloo", timeout=patience
        )
        self.trainers = TorchCollective().create_group(
            ranks=list(range(1, self.world_size)), backend=backend, timeout=patience
        )

    def check_weights(self, agent: nn.Module, update: int) -> None:
        """End the run if the processes hold different weights after an update; call it on all of them."""
        check_agreement(self.everyone.all_reduce(weights_checksum(agent).cpu()), self.world_size, update)

    def send_batch(self, batch: Batch, update: int) -> None:
        """Message 1, by the player: all rows to every trainer, or an almost equal, random part of them to each.

        Args:
            batch: B rows.
            update: its number, which decides the parts.
        """
        if self.args.share_data:
            self.everyone.broadcast(batch.pack().cpu(), PLAYER)
            return
        order = torch.from_numpy(stream(self.args.seed, Purpose.SCATTER, update).permutation(batch.num_rows))
        sizes = almost_equal_sizes(batch.num_rows, self.num_trainers)
        # A scatter wants equal parts, so all are padded to the largest, and a part for the player: the first, unmoved.
        padded = torch.zeros(self.num_trainers, sizes[0], sum(batch.field_bytes), dtype=torch.uint8)
        for part, share in zip(padded, order.split(sizes), strict=True):
            for block, rows in zip(part[: len(share)].split(ROWS_AT_ONCE), share.split(ROWS_AT_ONCE), strict=True):
                block[:] = Batch(*(field[rows.to(field.device)] for field in batch)).pack()
        self.everyone.scatter(padded[0], [padded[0], *padded], PLAYER)

    def receive_batch(self, template: Batch) -> Batch:
        """Message 1, by a trainer: its rows, on the device of the template, which gives the shapes and types."""
        num_rows = self.args.steps_per_update(self.world_size)
        row_bytes = sum(template.field_bytes)
        if self.args.share_data:
            rows = self.everyone.broadcast(torch.empty(num_rows, row_bytes, dtype=torch.uint8), PLAYER)
        else:
            sizes = almost_equal_sizes(num_rows, self.num_trainers)
            padded = torch.empty(sizes[0], row_bytes, dtype=torch.uint8)
            self.everyone.scatter(padded, [], PLAYER)
            rows = padded[: sizes[self.rank - 1]]
        return template.unpack(rows.to(template.actions.device))

    def send_losses(self, losses: Tensor) -> None:
        """Message 2, by the lead trainer; call it on every trainer.

        Args:
            losses: sums over the gradient steps of this trainer, as `sum_losses` returns them; over the trainers they
                are added up on the way.
        """
        losses = self.trainers.all_reduce(losses)
        if self.rank == LEAD_TRAINER:
            self.lead_and_player.broadcast(losses.cpu(), LEAD_TRAINER)

    def receive_losses(self) -> Tensor:
        """Message 2, by the player: the sums over all trainers, float64 [7], on the CPU."""
        return self.lead_and_player.broadcast(torch.empty(NUM_LOSS_SUMS, dtype=torch.float64), LEAD_TRAINER)

    def send_state(self, agent: nn.Module, optimizer: Optimizer) -> None:
        """Message 3, by the lead trainer: the new weights and the state of their Adam."""
        if self.rank == LEAD_TRAINER:
            tensors = [tensor.detach().flatten() for tensor in _state_tensors(agent, optimizer)]
            self.lead_and_player.broadcast(torch.cat(tensors).cpu(), LEAD_TRAINER)

    def receive_state(self, agent: nn.Module, optimizer: Optimizer) -> None:
        """Message 3, by the player: its agent and its Adam become those of the trainers."""
        for parameter in agent.parameters():
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        tensors = _state_tensors(agent, optimizer)
        sizes = [tensor.numel() for tensor in tensors]
        received = self.lead_and_player.broadcast(torch.empty(sum(sizes)), LEAD_TRAINER).to(tensors[0].device)
        for tensor, values in zip(tensors, received.split(sizes), strict=True):
            tensor.data.copy_(values.view_as(tensor))


def _state_tensors(agent: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters and the tensors of their Adam's state."""
    parameters = list(agent.parameters())
    states = [optimizer.state[parameter] for parameter in parameters]
    return parameters + [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
