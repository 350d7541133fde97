from itertools import pairwise, product

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch, Rollout
from rl.ppo.loss import ppo_loss
from rl.ppo.minibatches import almost_equal_sizes, minibatches


def numbered(row_numbers):
    """A batch in which every field tells the number of the row; the actions are the numbers themselves."""
    numbers = row_numbers.float()
    return Batch(torch.stack([numbers, -numbers], dim=1), row_numbers, *(numbers + k / 8 for k in range(1, 5)))


def row_numbers_of(batch):
    """The numbers of the rows, after a check that none of them was torn."""
    for field, expected in zip(batch, numbered(batch.actions), strict=True):
        assert torch.equal(field, expected)
    return batch.actions.tolist()


def cut(rows, world_size, batch_size, share_data, update=1, epoch=0, seed=0):
    """What the ranks take in one epoch: for each rank a list of (row numbers, mean rows)."""
    args = CommonArgs(seed=seed, num_steps=rows, per_rank_batch_size=batch_size, share_data=share_data)
    everything = torch.arange(rows)
    parts = [everything] * world_size if share_data else everything.tensor_split(world_size)
    return [
        [
            (row_numbers_of(minibatch), mean_rows)
            for minibatch, mean_rows in minibatches(numbered(part), rows, args, update, epoch, rank, world_size)
        ]
        for rank, part in enumerate(parts)
    ]


def flat(steps):
    return [row for rows, _ in steps for row in rows]


every_case = pytest.mark.parametrize(
    ("rows", "world_size", "batch_size"),
    [(256, 1, 64), (256, 2, 64), (100, 1, 64), (512, 3, 64), (512, 3, 1), (7, 3, 2), (10, 4, 1), (5, 5, 3), (9, 2, 99)],
)
shared_or_not = pytest.mark.parametrize("share_data", [False, True], ids=["own", "shared"])


@every_case
@shared_or_not
def test_every_row_is_taken_exactly_once_in_an_epoch_over_all_ranks(rows, world_size, batch_size, share_data):
    ranks = cut(rows, world_size, batch_size, share_data)
    assert sorted(row for steps in ranks for row in flat(steps)) == list(range(rows))


@every_case
@shared_or_not
def test_all_ranks_take_the_least_number_of_steps_that_keeps_minibatches_within_their_bound(
    rows, world_size, batch_size, share_data
):
    ranks = cut(rows, world_size, batch_size, share_data)
    largest_part = -(-rows // world_size)
    assert [len(steps) for steps in ranks] == [-(-largest_part // batch_size)] * world_size
    sizes = [len(minibatch) for steps in ranks for minibatch, _ in steps]
    assert max(sizes) <= batch_size


@every_case
@shared_or_not
def test_sizes_of_minibatches_differ_by_at_most_one(rows, world_size, batch_size, share_data):
    sizes = [len(minibatch) for steps in cut(rows, world_size, batch_size, share_data) for minibatch, _ in steps]
    assert max(sizes) - min(sizes) <= 1


@every_case
@shared_or_not
def test_the_mean_rows_of_a_step_are_the_average_over_the_ranks(rows, world_size, batch_size, share_data):
    for step in zip(*cut(rows, world_size, batch_size, share_data), strict=True):
        average = sum(len(minibatch) for minibatch, _ in step) / world_size
        assert [mean_rows for _, mean_rows in step] == [average] * world_size


@every_case
def test_with_shared_data_ranks_together_take_the_minibatches_of_one_process(rows, world_size, batch_size):
    ranks = cut(rows, world_size, batch_size, share_data=True)
    [alone] = cut(rows, 1, batch_size * world_size, share_data=True)
    for (minibatch, _), *step in zip(alone, *ranks, strict=True):
        assert sorted(row for part, _ in step for row in part) == sorted(minibatch)


def test_one_process_takes_the_same_minibatches_with_and_without_sharing():
    assert cut(100, 1, 30, share_data=True) == cut(100, 1, 30, share_data=False)


@shared_or_not
def test_the_order_is_new_in_every_epoch_and_every_update_and_for_every_seed(share_data):
    orders = [
        flat(cut(64, 2, 8, share_data, update, epoch, seed)[0])
        for update, epoch, seed in product((1, 2), (0, 1, 2), (0, 1))
    ]
    assert len(set(map(tuple, orders))) == len(orders)


@shared_or_not
def test_the_order_is_the_same_if_asked_for_again(share_data):
    assert cut(64, 2, 8, share_data) == cut(64, 2, 8, share_data)


def test_the_order_is_shuffled():
    """Neighbours in a random order of n rows are neighbours in number with probability 2/n: about twice in all."""
    [steps] = cut(1000, 1, 64, share_data=False)
    assert sum(abs(a - b) == 1 for a, b in pairwise(flat(steps))) < 10


def test_with_shared_data_the_subset_of_a_rank_is_new_in_every_epoch():
    subsets = {frozenset(flat(cut(64, 2, 32, True, update, epoch)[0])) for update in (1, 2) for epoch in (0, 1)}
    assert len(subsets) == 4


def test_without_shared_data_each_rank_keeps_its_rows_and_shuffles_them_for_itself():
    ranks = [flat(steps) for steps in cut(64, 4, 8, share_data=False)]
    for rank, rows in enumerate(ranks):
        assert sorted(rows) == list(range(16 * rank, 16 * rank + 16))
    assert len({tuple(row % 16 for row in rows) for rows in ranks}) == 4


def test_a_minibatch_without_rows_gives_a_gradient_of_zeros():
    """With more ranks than rows in a minibatch, some ranks have none of it and yet take the step."""
    sizes = [len(minibatch) for steps in cut(10, 4, 1, share_data=True) for minibatch, _ in steps]
    assert min(sizes) == 0
    agent = Agent(Box(-1, 1, (2,)), Discrete(2), CommonArgs())
    loss = ppo_loss(agent, numbered(torch.arange(0)), 2.5, CommonArgs()).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in agent.parameters())


@pytest.mark.parametrize(("rows", "parts"), [(512, 3), (7, 7), (3, 5), (0, 2), (1024, 1)])
def test_almost_equal_sizes_are_those_of_numpys_array_split(rows, parts):
    assert almost_equal_sizes(rows, parts) == [len(part) for part in np.array_split(range(rows), parts)]


def random_bytes(dtype, *shape, seed):
    """Any bits at all: they may be NaNs, infinities and negative zeros."""
    size = np.dtype(dtype).itemsize
    bits = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * size), dtype=np.uint8)
    return torch.from_numpy(bits.view(dtype))


@pytest.mark.parametrize(
    ("observation", "action"),
    [("float32", "int64"), ("float64", "int32"), ("uint8", "uint8"), ("float16", "float32")],
)
@pytest.mark.parametrize("action_shape", [(), (3,)])
def test_pack_writes_the_bytes_of_each_row_and_unpack_reads_them(observation, action, action_shape):
    rows = 6
    batch = Batch(
        random_bytes(observation, rows, 5, seed=0),
        random_bytes(action, *(rows, *action_shape) if action_shape else (rows,), seed=1),
        *(random_bytes("float32", rows, seed=seed) for seed in range(2, 6)),
    )
    packed = batch.pack()
    assert packed.dtype == torch.uint8
    assert sum(batch.field_bytes) == packed.shape[1]
    for row in range(rows):
        assert packed[row].numpy().tobytes() == b"".join(field[row].numpy().tobytes() for field in batch)

    some = batch.unpack(packed[[4, 0]])
    template = Batch(*(field[:0] for field in batch))
    for unpacked in (batch.unpack(packed), template.unpack(packed)):
        for actual, expected in zip(unpacked, batch, strict=True):
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            assert actual.numpy().tobytes() == expected.numpy().tobytes()
    for actual, expected in zip(some, batch, strict=True):
        assert actual.numpy().tobytes() == expected[[4, 0]].numpy().tobytes()


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("action", ["int64", "int8", "float32"])
@pytest.mark.parametrize("observation", ["uint8", "float32"])
def test_a_batch_of_few_rows_unpacks_what_it_packed(observation, action, rows):
    """Some trainer is dealt a single row where there are as many trainers as rows."""
    numbers = [random_bytes("float32", rows, seed=seed) for seed in range(4)]
    observations = random_bytes(observation, rows, 5, seed=4)
    for actions in (random_bytes(action, rows, seed=5), random_bytes(action, rows, 3, seed=5)):
        batch = Batch(observations, actions, *numbers)
        template = Batch(*(field[:0] for field in batch))
        for unpacked in (batch.unpack(batch.pack()), template.unpack(batch.pack())):
            for actual, expected in zip(unpacked, batch, strict=True):
                assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
                assert actual.numpy().tobytes() == expected.numpy().tobytes()


def numbered_rollout(env_indices, num_steps=3):
    """A rollout in which number 100 n + t stands wherever environment n took step t."""
    numbers = torch.tensor([[100 * n + t for n in env_indices] for t in range(num_steps)])
    x = numbers.float()
    observations = torch.stack([x, -x], dim=-1)
    rollout = Rollout(
        observations + 70, observations, numbers, x + 0.125, x + 50, x > 0, values=x + 0.25, next_values=x + 60
    )
    return Batch.from_rollout(rollout, advantages=x + 0.375, returns=x + 0.5)


def test_a_rollout_becomes_rows_environment_after_environment():
    assert row_numbers_of(numbered_rollout([0, 1])) == [0, 1, 2, 100, 101, 102]


def test_rows_of_ranks_one_after_the_other_are_those_of_one_process_with_all_environments():
    ranks = [numbered_rollout([0, 1]), numbered_rollout([2, 3])]
    gathered = ranks[0].unpack(torch.cat([rank.pack() for rank in ranks]))
    alone = numbered_rollout([0, 1, 2, 3])
    assert row_numbers_of(gathered) == row_numbers_of(alone)
    assert alone.num_rows == 12


def test_an_empty_batch_of_an_agent_unpacks_what_a_rollout_of_them_packed():
    batch = numbered_rollout([0, 1])
    empty = Batch.zeros(0, Agent(Box(-np.inf, np.inf, (2,)), Discrete(2), CommonArgs()))
    assert empty.num_rows == 0
    assert empty.field_bytes == batch.field_bytes == [8, 8, 4, 4, 4, 4]
    assert row_numbers_of(empty.unpack(batch.pack())) == row_numbers_of(batch)
