"""E3 and E4, gradient by gradient: W ranks with minibatches of b take the steps of one rank with W b."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl.args import CommonArgs
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss
from rl.ppo.minibatches import almost_equal_sizes, minibatches
from tests.launching import ROOT, run, torchrun
from tests.workers.gradients import make_agent, make_batch

# Relative to the largest gradient: a sum over rows that is split over ranks rounds otherwise.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6}
# Ranks, rows, per-rank batch size; even, uneven, and so few rows that some rank has none.
CASES = [(2, 256, 32), (3, 512, 64), (3, 100, 16), (3, 7, 1)]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Tensor]:
    """The gradients that DistributedDataParallel averaged, for every case."""
    results = {}
    for ranks in (2, 3):
        cases = [
            (dtype, rows, batch_size, share_data)
            for dtype in TOLERANCE
            for case_ranks, rows, batch_size in CASES
            for share_data in (True, False)
            if case_ranks == ranks
        ]
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        command = torchrun(ranks, "tests/workers/gradients.py", str(folder / "out"), *map(json.dumps, cases))
        finished = run(command, cwd=folder, timeout=60, env={"PYTHONPATH": str(ROOT)})
        assert finished.returncode == 0, finished.output
        loaded = torch.load(Path(folder / "out"), weights_only=True)
        results |= {(ranks, *case): loaded[json.dumps(case)] for case in cases}
    return results


def gradient(batch: Batch) -> Tensor:
    """The gradient of the mean loss of these rows, in one process."""
    agent = make_agent(batch.observations.dtype)
    ppo_loss(agent, batch, batch.num_rows, CommonArgs(ent_coef=0.01)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])


def assert_equal_gradients(actual: Tensor, expected: list[Batch], dtype: str) -> None:
    gradients = torch.stack([gradient(minibatch) for minibatch in expected])
    assert actual.shape == gradients.shape
    assert gradients.abs().max() > 1e-3
    assert torch.allclose(actual, gradients, rtol=0, atol=TOLERANCE[dtype] * gradients.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ranks", "rows", "batch_size"), CASES)
def test_ranks_that_share_data_take_the_gradients_of_one_rank_with_minibatches_as_large_as_theirs_together(
    distributed, ranks, rows, batch_size, dtype
):
    args = CommonArgs(num_steps=rows, per_rank_batch_size=ranks * batch_size, share_data=True)
    one_rank = minibatches(make_batch(rows, getattr(torch, dtype)), rows, args, 1, 0, 0, 1)
    expected = [minibatch for minibatch, _ in one_rank]
    assert_equal_gradients(distributed[ranks, dtype, rows, batch_size, True], expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ranks", "rows", "batch_size"), CASES)
def test_ranks_with_parts_of_their_own_average_to_the_gradient_of_their_rows_together(
    distributed, ranks, rows, batch_size, dtype
):
    args = CommonArgs(num_steps=rows, per_rank_batch_size=batch_size)
    batch = make_batch(rows, getattr(torch, dtype))
    parts = zip(*(field.split(almost_equal_sizes(rows, ranks)) for field in batch), strict=True)
    cut = [minibatches(Batch(*part), rows, args, 1, 0, rank, ranks) for rank, part in enumerate(parts)]
    expected = [
        Batch(*map(torch.cat, zip(*(minibatch for minibatch, _ in same_step), strict=True)))
        for same_step in zip(*cut, strict=True)
    ]
    assert_equal_gradients(distributed[ranks, dtype, rows, batch_size, False], expected, dtype)
