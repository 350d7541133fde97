"""Experience as rows: from a rollout to a batch, over the wire, and cut into minibatches."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from rl.args import CommonArgs
from rl.distributions import Distribution
from rl.rollout import Rollout
from rl.seeding import Purpose, stream
from rl.spaces import stored_dtype, stored_space


class Batch(NamedTuple):
    """B rows of experience, in no order that matters."""

    observations: Tensor  # [B, *shape], normalised
    actions: Tensor  # [B, ...]
    log_probs: Tensor  # float32 [B]
    values: Tensor  # float32 [B]
    advantages: Tensor  # float32 [B]
    returns: Tensor  # float32 [B]

    @classmethod
    def from_rollout(cls, rollout: Rollout, advantages: Tensor, returns: Tensor) -> "Batch":
        """Flatten [T, N] to [B], environment after environment.

        So the rows of all ranks one after the other are the rows of one process with all environments.
        """
        fields = (rollout.observations, rollout.actions, rollout.log_probs, rollout.values, advantages, returns)
        return cls(*(field.transpose(0, 1).flatten(0, 1) for field in fields))

    @classmethod
    def zeros(cls, num_rows: int, observation_space: gym.Space, distribution: Distribution) -> "Batch":
        """Return rows of zeros. No rows at all are enough for the shapes and types that `unpack` needs.

        Args:
            num_rows: number of rows.
            observation_space: as the environment declares it.
            distribution: of the actions.
        """
        dtype = getattr(torch, stored_dtype(observation_space))
        observations = torch.zeros(num_rows, *stored_space(observation_space).shape, dtype=dtype)
        return cls(observations, distribution.empty_actions(num_rows), *(torch.zeros(num_rows) for _ in range(4)))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(field.to(device) for field in self))

    def pack(self) -> Tensor:
        """Return the rows as bytes, uint8 [B, bytes of a row]: one message, whatever the types."""
        columns = (field.reshape(len(field), prod(field.shape[1:])).view(torch.uint8) for field in self)
        return torch.cat(list(columns), dim=1)

    def unpack(self, packed: Tensor) -> "Batch":
        """Return the batch that was packed; this batch gives the shapes and types, its own rows do not matter."""
        # A copy of each column is aligned. `contiguous` would not copy that of a single row.
        columns = [column.clone(memory_format=torch.contiguous_format) for column in packed.split(self.field_bytes, 1)]
        return Batch(
            *(
                column.view(field.dtype).reshape(len(packed), *field.shape[1:])
                for column, field in zip(columns, self, strict=True)
            )
        )

    @property
    def num_rows(self) -> int:
        """B; the length of the tuple is the number of fields."""
        return len(self.actions)

    @property
    def field_bytes(self) -> list[int]:
        """Bytes of each field in a row."""
        return [prod(field.shape[1:]) * field.dtype.itemsize for field in self]


def almost_equal_sizes(rows: int, parts: int) -> list[int]:
    """Return the sizes of `parts` parts of `rows` rows; they differ by at most one (as `torch.tensor_split`)."""
    return [rows // parts + (part < rows % parts) for part in range(parts)]


def minibatches(
    batch: Batch, num_rows: int, args: CommonArgs, update: int, epoch: int, rank: int, world_size: int
) -> Iterator[tuple[Batch, float]]:
    """Shuffle this rank's rows for one epoch and cut them into minibatches.

    Every rank takes the same number of steps: the rows are cut into as many almost equal minibatches as are needed
    for none to exceed `per_rank_batch_size`.

    - Without `share_data`, `batch` is what this rank alone has, one of almost equal parts of all the data, and each
      rank shuffles for itself.
    - With `share_data`, `batch` is all the data. All ranks shuffle alike and cut it into global minibatches, and of
      each one every rank takes every `world_size`-th row. So the ranks' rows are disjoint, drawn anew in each
      epoch, and W ranks with minibatches of b take the steps of one rank with minibatches of W b.

    Args:
        batch: see above.
        num_rows: rows of the update, over all ranks.
        args: `seed`, `per_rank_batch_size` and `share_data` count here.
        update: number of the update, from 1.
        epoch: number of the epoch in the update.
        rank: place of this process among those that optimize.
        world_size: number of processes that optimize.

    Yields:
        A minibatch, and the average number of its rows over the ranks: see `ppo_loss`.
    """
    rng = stream(args.seed, Purpose.SHUFFLE, update, epoch, 0 if args.share_data else rank)
    order = torch.from_numpy(rng.permutation(batch.num_rows))
    sizes = minibatch_sizes(num_rows, args, world_size)
    if args.share_data:
        order = torch.cat([rows[rank::world_size] for rows in order.split([sum(ranks) for ranks in sizes])])
    # All rows are gathered at once, which is faster than minibatch by minibatch.
    order = order.to(batch.actions.device)
    fields = (field.index_select(0, order).split([ranks[rank] for ranks in sizes]) for field in batch)
    for minibatch, ranks in zip(zip(*fields, strict=True), sizes, strict=True):
        yield Batch(*minibatch), sum(ranks) / world_size


def minibatch_sizes(num_rows: int, args: CommonArgs, world_size: int) -> list[list[int]]:
    """Return how many rows the minibatches of an epoch have: for each one, its sizes on all ranks.

    Args:
        num_rows: rows of the update, over all ranks.
        args: `per_rank_batch_size` and `share_data` count here.
        world_size: number of processes that optimize.
    """
    steps = args.minibatches_per_epoch(num_rows, world_size)
    if args.share_data:
        return [almost_equal_sizes(size, world_size) for size in almost_equal_sizes(num_rows, steps)]
    parts = almost_equal_sizes(num_rows, world_size)
    return [list(sizes) for sizes in zip(*(almost_equal_sizes(part, steps) for part in parts), strict=True)]
