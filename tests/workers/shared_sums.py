"""One rank of several, which meet in a file: it does what it is told, or all checks of `CHECKS`.

Usage: shared_sums.py FOLDER RANK WORLD_SIZE [what to do]
"""

import json
import os
import platform
import random
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from rl.fast import shared_memory
from rl.fast.shared_memory import SharedMemoryGroup, use_shared_memory

SLOT_NUMBERS = 2**16
shared_memory.SLOT = 4 * SLOT_NUMBERS  # so that little is much
PATIENCE = timedelta(seconds=60)
BRIEF = timedelta(seconds=5)


def shared_group() -> SharedMemoryGroup:
    group = dist.new_group(timeout=PATIENCE, backend="shared")
    assert isinstance(group, SharedMemoryGroup)
    return group


def values_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        exponents = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** (3 * exponents)).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def sum_in_order(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    total = values_of(0, shape, dtype, seed)
    for rank in range(1, dist.get_world_size()):
        total = total + values_of(rank, shape, dtype, seed)
    return total


def check_sums() -> None:
    """They are those of gloo, bit for bit."""
    group, gloo, rank = shared_group(), dist.new_group(backend="gloo"), dist.get_rank()
    shapes = [(), (1,), (7,), (0,), (10_000,), (3, 5, 7), (SLOT_NUMBERS // 2,)]
    for dtype in (torch.float32, torch.float64):
        for shape in shapes:
            expected = sum_in_order(shape, dtype)
            total = values_of(rank, shape, dtype)
            dist.all_reduce(total, group=group)
            assert torch.equal(total, expected), (dtype, shape)
            total = values_of(rank, shape, dtype)
            dist.all_reduce(total, group=gloo)
            assert torch.equal(total, expected), (dtype, shape)


def check_average_and_strides() -> None:
    """A tensor that is not contiguous is summed right, too, other than by gloo."""
    group, rank = shared_group(), dist.get_rank()
    columns = torch.ones(3, 2)
    dist.all_reduce(columns[:, 1], group=group)
    assert columns.tolist() == [[1, dist.get_world_size()]] * 3
    mean = torch.tensor([float(rank), 1.0])
    dist.all_reduce(mean, dist.ReduceOp.AVG, group=group)
    assert mean.tolist() == [(dist.get_world_size() - 1) / 2, 1]


def check_what_gloo_does() -> None:
    """Other types, operations and collectives work as before."""
    group, rank, size = shared_group(), dist.get_rank(), dist.get_world_size()
    before = group.round
    half = torch.ones(3, dtype=torch.float16)
    large = torch.ones(SLOT_NUMBERS + 1)
    for tensor in (half, large):
        dist.all_reduce(tensor, group=group)
        assert tensor.unique().tolist() == [size]
    largest = torch.tensor([rank])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    assert largest.item() == size - 1
    rows = [torch.empty(2) for _ in range(size)]
    dist.all_gather(rows, torch.full((2,), float(rank)), group=group)
    assert [row[1].item() for row in rows] == list(range(size))
    together = torch.empty(size)
    dist.all_gather_single(together, torch.full((1,), float(rank)), group=group)
    assert together.tolist() == list(range(size))
    assert group.round == before
    objects = [{"rank": rank}]
    dist.broadcast_object_list(objects, 1, group=group)
    assert objects == [{"rank": 1}]
    work = dist.all_reduce(half, group=group, async_op=True)
    work.wait()
    assert dist.get_backend(group) == "shared"


def check_many_rounds() -> None:
    """In any order, with ranks that come early and late, nobody reads what is not meant for it."""
    group, rank = shared_group(), dist.get_rank()
    common, own = random.Random(1), random.Random(rank)
    for seed in range(300):
        if own.random() < 0.1:
            time.sleep(own.choice([0, 0.0003, 0.003]))
        what = common.choice(["sum", "sum", "barrier"])
        shape = (common.choice([1, 1, 100, 100, 100, 10_000, SLOT_NUMBERS]),)
        tensor = values_of(rank, shape, seed=seed)
        if what == "sum":
            dist.all_reduce(tensor, group=group)
            assert torch.equal(tensor, sum_in_order(shape, torch.float32, seed))
        else:
            dist.barrier(group=group)


def check_many_messages() -> None:
    """What gloo does for the group does not wait for the lock of the interpreter while it holds that."""
    group = shared_group()
    for _ in range(3000):
        dist.broadcast(torch.zeros(1), 0, group=group)


def check_barrier() -> None:
    group, rank = shared_group(), dist.get_rank()
    dist.barrier(group=group)
    begin = time.monotonic()
    if rank == 1:
        time.sleep(0.3)
    dist.barrier(group=group)
    assert 0.2 < time.monotonic() - begin < 5


def check_data_parallel() -> None:
    """`DistributedDataParallel` sums gradients in shared memory, and steps as with gloo."""
    weights = []
    for group in (dist.new_group(backend="gloo"), shared_group()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 200), nn.BatchNorm1d(200), nn.Tanh(), nn.Linear(200, 200))
        wrapped = DistributedDataParallel(model, process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before = group.round if isinstance(group, SharedMemoryGroup) else 0
        for step in range(5):
            wrapped(values_of(dist.get_rank(), (16, 8), seed=step).clamp(-3, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(group, SharedMemoryGroup):
            assert group.round >= before + 5
        weights.append(torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()]))
    assert torch.equal(*weights)


def check_group_of_all() -> None:
    """The group of all sums in shared memory, and a group that is gloo's by name does not."""
    group, total = dist.group.WORLD, torch.ones(1)
    assert isinstance(group, SharedMemoryGroup) and dist.get_backend() == "shared"
    before = group.round
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size() and group.round == before + 1
    later = dist.new_group(backend="gloo", timeout=PATIENCE)
    dist.all_reduce(total, group=later)
    assert not isinstance(later, SharedMemoryGroup) and total.item() == dist.get_world_size() ** 2


def check_subgroups() -> None:
    """Made by name, by Lightning, and afterwards; who is no member has nothing to do."""
    from lightning.fabric.plugins.collectives import TorchCollective  # takes seconds

    rank, size = dist.get_rank(), dist.get_world_size()
    members = list(range(1, size)) if size > 2 else [0, 1]
    collective = TorchCollective().create_group(ranks=members, backend="shared", timeout=PATIENCE)
    group = dist.new_group(members, timeout=PATIENCE, backend="shared")
    alone = [dist.new_group([member], backend="shared") for member in range(size)][rank]
    assert not isinstance(alone, SharedMemoryGroup)
    if rank not in members:
        assert group == dist.GroupMember.NON_GROUP_MEMBER
        return
    for each in (group, collective.group):
        assert isinstance(each, SharedMemoryGroup) and each.size() == len(members)
        total = torch.tensor([2.0**rank])
        dist.all_reduce(total, group=each)
        assert total.item() == sum(2.0**member for member in members)
        dist.broadcast(total, members[-1], group=each)
    assert collective.all_reduce(torch.ones(1), "sum").item() == len(members)
    collective.barrier()
    dist.destroy_process_group(group)


def check_three_are_left_to_gloo() -> None:
    """Gloo adds three and more in an order of its own, and processes on several hosts must add alike."""
    group, total = dist.new_group(backend="shared"), torch.ones(1)
    dist.all_reduce(total, group=group)
    assert not isinstance(group, SharedMemoryGroup) and total.item() == 3


def check_step_aside() -> None:
    """If one rank does not see the memory, or sums it wrongly, no rank goes on with it."""
    rank, right = dist.get_rank(), SharedMemoryGroup.allreduce

    def wrong(group: SharedMemoryGroup, tensors: list[Tensor], opts: object = None) -> dist.Work:
        work = right(group, tensors, opts)
        tensors[0][-1] += 1
        return work

    for owner, name, replacement, who in (
        (socket, "gethostname", lambda: "elsewhere", 1),
        (platform, "machine", lambda: "aarch64", 0),
        (os, "readlink", lambda path: "/memfd:another", 1),
        (SharedMemoryGroup, "allreduce", wrong, 1),
    ):
        with patch.object(owner, name, replacement if rank == who else getattr(owner, name)):
            group = dist.new_group(timeout=PATIENCE, backend="shared")
        assert not isinstance(group, SharedMemoryGroup)
        total = torch.ones(2)
        dist.all_reduce(total, group=group)
        assert total.tolist() == [dist.get_world_size()] * 2


CHECKS = [
    check_sums,
    check_average_and_strides,
    check_what_gloo_does,
    check_many_rounds,
    check_many_messages,
    check_barrier,
    check_data_parallel,
    check_subgroups,
    check_step_aside,
    check_group_of_all,
]


CHECKS_OF_THREE = [check_subgroups, check_three_are_left_to_gloo]


def check_all(folder: Path) -> None:
    """Leave for each check, up to the first that fails, a traceback, empty if it passes."""
    results = {}
    for check in CHECKS if dist.get_world_size() == 2 else CHECKS_OF_THREE:
        try:
            check()
            results[check.__name__] = ""
        except BaseException:
            results[check.__name__] = traceback.format_exc()
            break
    (folder / f"results-{dist.get_rank()}").write_text(json.dumps(results))


def wait_in(step: str) -> None:
    """Rank 0 waits for a sum that does not come; what comes over rank 1 is in the hands of the test, or `step`."""
    if step == "brief sum":
        distributed_c10d._set_pg_timeout(BRIEF)
    model = DistributedDataParallel(nn.Linear(3, 3))
    dist.barrier()
    print("ready", flush=True)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        model(torch.ones(1, 3)).sum().backward() if step == "backward" else dist.all_reduce(torch.ones(3))
    elif step == "destroy":
        dist.destroy_process_group()
    time.sleep(60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    use_shared_memory()
    dist.init_process_group(
        "shared",
        init_method=f"file://{folder.resolve()}/store",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    if len(sys.argv) > 4:
        wait_in(sys.argv[4])
    else:
        check_all(folder)
        dist.destroy_process_group()
