"""The channel between the player and the trainers: three messages, each send directly above its receive."""

from datetime import timedelta
from typing import Literal

import torch
from lightning.fabric.plugins.collectives import TorchCollective
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from rl.ppo.minibatches import almost_equal_sizes
from rl.processes.agreement import check_agreement, weights_checksum

PLAYER = 0
LEAD_TRAINER = 1


class Channel:
    """Owns the groups of processes and the order in which they talk.

        player (rank 0)                               trainers (ranks 1..N)
                  <--- 1. weights ------------------  lead trainer (rank 1)
                  ---- 2. batch, a share each ----->  every trainer
                  <--- 3. losses -------------------  lead trainer

    Both sides know the shape and the type of every message, so only tensors travel, and nothing is pickled. They
    travel on the CPU, with gloo, wherever they come from.

    Args:
        rank: of this process.
        world_size: number of processes: one player and N trainers. They have joined a group of all, with gloo.
        backend: of the trainers among themselves; gloo if any process says so.
        timeout: seconds that a process waits for another.
    """

    def __init__(self, rank: int, world_size: int, backend: Literal["gloo", "nccl"], timeout: float) -> None:
        self.rank = rank
        self.num_trainers = world_size - 1
        # Every process creates every group, in the same order, whether it belongs to it or not. A group does not
        # inherit the time that it waits.
        patience = timedelta(seconds=timeout)
        trainers = list(range(1, world_size))
        self.everyone = TorchCollective().setup()
        shared_gpus = self.everyone.all_reduce(torch.tensor(int(backend == "gloo")))  # on any machine
        backend = "gloo" if shared_gpus else backend
        self.lead_and_player = TorchCollective().create_group(
            ranks=[PLAYER, LEAD_TRAINER], backend="gloo", timeout=patience
        )
        self.trainers = TorchCollective().create_group(ranks=trainers, backend=backend, timeout=patience)

    def send_weights(self, agent: nn.Module) -> None:
        """Message 1, by the lead trainer; the other trainers hold the same weights and have nothing to do."""
        if self.rank == LEAD_TRAINER:
            self.lead_and_player.broadcast(parameters_to_vector(agent.parameters()).detach().cpu(), LEAD_TRAINER)

    def receive_weights(self, agent: nn.Module) -> None:
        """Message 1, by the player: the weights of its agent become those of the trainers."""
        weights = parameters_to_vector(agent.parameters()).detach()
        copy_weights(self.lead_and_player.broadcast(torch.empty_like(weights, device="cpu"), LEAD_TRAINER), agent)

    def check_weights(self, agent: nn.Module, update: int) -> None:
        """End the run if the processes hold different weights after an update; call it on all of them."""
        checksum = weights_checksum(agent).cpu()
        checksums = self.everyone.all_gather(
            [torch.empty_like(checksum) for _ in range(1 + self.num_trainers)], checksum
        )
        check_agreement(torch.cat(checksums), update)

    def send_rows(self, rows: Tensor, share_data: bool) -> None:
        """Message 2, by the player: all rows to every trainer, or an almost equal part of them to each.

        Args:
            rows: packed rows, uint8 [B, bytes of a row]; in parts they go in this order.
            share_data: whether every trainer receives all rows.
        """
        rows = rows.cpu()
        if share_data:
            self.everyone.broadcast(rows, PLAYER)
            return
        sizes = almost_equal_sizes(len(rows), self.num_trainers)
        # A scatter wants equal parts, one for the player itself too: all are padded to the largest.
        padded = rows.new_zeros(1 + self.num_trainers, sizes[0], rows.shape[1])
        for part, share in zip(padded[1:], rows.split(sizes), strict=True):
            part[: len(share)] = share
        self.everyone.scatter(torch.empty_like(padded[0]), list(padded), PLAYER)

    def receive_rows(self, num_rows: int, row_bytes: int, share_data: bool) -> Tensor:
        """Message 2, by a trainer: packed rows, uint8 [rows of this trainer, row_bytes], on the CPU.

        Args:
            num_rows: B, the rows that the player sends in all.
            row_bytes: bytes of a row.
            share_data: whether every trainer receives all rows.
        """
        if share_data:
            return self.everyone.broadcast(torch.empty(num_rows, row_bytes, dtype=torch.uint8), PLAYER)
        sizes = almost_equal_sizes(num_rows, self.num_trainers)
        padded = torch.empty(sizes[0], row_bytes, dtype=torch.uint8)
        self.everyone.scatter(padded, [], PLAYER)
        return padded[: sizes[self.rank - 1]]

    def send_losses(self, losses: Tensor) -> None:
        """Message 3, by the lead trainer; call it on every trainer.

        Args:
            losses: sums over the gradient steps of this trainer, as `sum_losses` returns them; over the trainers they
                are added up on the way.
        """
        losses = self.trainers.all_reduce(losses)
        if self.rank == LEAD_TRAINER:
            self.lead_and_player.broadcast(losses.cpu(), LEAD_TRAINER)

    def receive_losses(self, size: int) -> Tensor:
        """Message 3, by the player: the sums over all trainers, float64 [size], on the CPU."""
        return self.lead_and_player.broadcast(torch.empty(size, dtype=torch.float64), LEAD_TRAINER)

    def send_state(self, agent: nn.Module, optimizer: Optimizer) -> None:
        """For the checkpoint, by the lead trainer: the new weights and the state of their Adam."""
        if self.rank == LEAD_TRAINER:
            tensors = [tensor.detach().flatten().cpu() for tensor in _state_tensors(agent, optimizer)]
            self.lead_and_player.broadcast(torch.cat(tensors), LEAD_TRAINER)

    def receive_state(self, agent: nn.Module, optimizer: Optimizer) -> None:
        """For the checkpoint, by the player: its agent and its Adam become those of the trainers."""
        for parameter in agent.parameters():
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        tensors = _state_tensors(agent, optimizer)
        sizes = [tensor.numel() for tensor in tensors]
        received = self.lead_and_player.broadcast(torch.empty(sum(sizes)), LEAD_TRAINER)
        for tensor, values in zip(tensors, received.split(sizes), strict=True):
            tensor.data.copy_(values.view_as(tensor))


def copy_weights(weights: Tensor, agent: nn.Module) -> None:
    """Give the parameters of an agent these values, [P], as `parameters_to_vector` lays them out.

    Each keeps its place in memory: the last bit of a matrix product depends on alignment.
    """
    sizes = [parameter.numel() for parameter in agent.parameters()]
    for parameter, values in zip(agent.parameters(), weights.split(sizes), strict=True):
        parameter.data.copy_(values.view_as(parameter))


def _state_tensors(agent: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters and the tensors of their Adam's state."""
    parameters = list(agent.parameters())
    states = [optimizer.state[parameter] for parameter in parameters]
    return parameters + [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
