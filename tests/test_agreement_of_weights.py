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


def test_equal_weights_have_equal_checksums_and_nothing_happens():
    one, other = weights_checksum(make()), weights_checksum(make())
    assert (one.dtype, one.shape) == (torch.int64, (1,))
    for checksums in (torch.cat([one, other]), torch.stack([one, other])):
        check_agreement(checksums, update=1)


def test_any_bit_of_a_weight_changes_the_checksum():
    whole = weights_checksum(make())
    for place in (0, 1):
        for bit in range(32):
            flip(agent := make(), place, bit)
            assert weights_checksum(agent) != whole


def test_the_order_of_the_weights_counts():
    swapped = make()
    swapped[0].weight.data = swapped[0].weight.data.flip(0)
    assert weights_checksum(swapped) != weights_checksum(make())


def test_the_checksum_is_the_sum_of_the_bits_each_times_its_place():
    agent = nn.Linear(1, 1)
    agent.weight.data, agent.bias.data = torch.tensor([[1.0]]), torch.tensor([-2.0])
    assert weights_checksum(agent).item() == 1 * 0x3F800000 + 2 * (0xC0000000 - 2**32)


def test_ranks_that_hold_different_weights_end_the_run_with_a_line_that_shows_their_checksums():
    with pytest.raises(RunError) as error:
        check_agreement(torch.tensor([[3], [3], [4]]), update=17)
    assert str(error.value) == "after update 17 the ranks hold different weights, checksums [3, 3, 4]"
