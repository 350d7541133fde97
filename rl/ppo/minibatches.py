"""How the rows of an update are cut into minibatches, for each rank and epoch."""

from collections.abc import Iterator

import torch

from rl.args import CommonArgs
from rl.ppo.batch import Batch
from rl.seeding import Purpose, stream

GATHERED = 2**22  # bytes of minibatches that are gathered at once


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
    order = order.to(batch.actions.device)
    # The rows of many minibatches are gathered at once, which is faster.
    at_once = max(1, GATHERED // (sizes[0][rank] * sum(batch.field_bytes) or 1))
    for first in range(0, len(sizes), at_once):
        some = sizes[first : first + at_once]
        rows, order = order.tensor_split([sum(ranks[rank] for ranks in some)])
        fields = (field.index_select(0, rows).split([ranks[rank] for ranks in some]) for field in batch)
        for minibatch, ranks in zip(zip(*fields, strict=True), some, strict=True):
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
