"""The guard sees any difference between the weights of two processes."""

import pytest
import torch
from torch import nn

from rl.processes.agreement import check_agreement, weights_checksum
from rl.voice import RunError


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def flip(agent, place, bit):
    """Flip one bit of one weight."""
    weights = agent[place].weight.data.flatten()
    weights.view(torch.int32)[-1] ^= 1 << bit if bit < 31 else -(1 << 31)
    agent[place].weight.data = weights.view_as(agent[place].weight)


def checksum(agent):
    """What is made of the numbers that travel."""
    numbers, squares = weights_checksum(agent)
    assert torch.equal(numbers.square(), squares)
    return sum(int(number) << 16 * place for place, number in enumerate(numbers))


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_ranks_that_hold_the_same_weights_go_on(world_size):
    check_agreement(sum(weights_checksum(make()) for _ in range(world_size)), world_size, update=1)


@pytest.mark.parametrize("world_size", [2, 3, 64])
@pytest.mark.parametrize("bit", [0, 15, 23, 31])
def test_one_bit_of_one_rank_ends_the_run_with_a_line(world_size, bit):
    flip(other := make(), 1, bit)
    sums = weights_checksum(other) + sum(weights_checksum(make()) for _ in range(world_size - 1))
    with pytest.raises(RunError, match=r"^after update 17 the ranks hold different weights$"):
        check_agreement(sums, world_size, update=17)


def test_any_bit_of_a_weight_changes_the_checksum():
    whole = checksum(make())
    for place in (0, 1):
        for bit in range(32):
            flip(agent := make(), place, bit)
            assert checksum(agent) != whole


def test_the_order_of_the_weights_counts():
    swapped = make()
    swapped[0].weight.data = swapped[0].weight.data.flip(0)
    assert checksum(swapped) != checksum(make())


def test_the_checksum_is_the_sum_of_the_bits_each_times_its_place():
    agent = nn.Linear(1, 1)
    agent.weight.data, agent.bias.data = torch.tensor([[1.0]]), torch.tensor([-2.0])
    assert checksum(agent) == (1 * 0x3F800000 + 2 * (0xC0000000 - 2**32)) % 2**64
