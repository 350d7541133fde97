"""Started by `fabric run`: all that Fabric sums goes through shared memory, once one line has asked for it."""

from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from rl.fast.shared_memory import SharedMemoryGroup, use_shared_memory

use_shared_memory()
fabric = Fabric()
group = dist.group.WORLD
assert isinstance(group, SharedMemoryGroup)

rank = torch.tensor(float(fabric.global_rank))
assert fabric.all_reduce(rank.clone(), reduce_op="sum").item() == 1
assert fabric.all_reduce(rank.clone()).item() == 0.5
assert fabric.broadcast(fabric.global_rank, 1) == 1
assert fabric.all_gather(rank).tolist() == [0, 1]
fabric.barrier()

torch.manual_seed(0)
model = nn.Linear(3, 1, bias=False)
wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
before = group.round
fabric.backward(wrapped(torch.full((1, 3), rank.item())).sum())
assert group.round > before
assert model.weight.grad is not None and model.weight.grad.tolist() == [[0.5] * 3]

Path(f"rank-{fabric.global_rank}").touch()
dist.destroy_process_group()
