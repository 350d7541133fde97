"""The player deals the rows of each rollout out at random: seen in a real run, on the side of the trainers."""

from itertools import pairwise

import pytest
import torch

from tests.launching import ROOT, WORKERS, assert_no_process_is_left, fabric_run, run

UPDATES, ROWS, TRAINERS = 3, 65, 2


@pytest.fixture(scope="module")
def deals(tmp_path_factory):
    """Of each update, for each trainer, the places in the rollout of the rows that it was dealt."""
    folder = tmp_path_factory.mktemp("deal")
    flags = f"--num-envs 1 --num-steps {ROWS} --total-timesteps {UPDATES * ROWS} --update-epochs 1 --test-episodes 1"
    worker = [WORKERS / "record_deal.py", str(folder), str(ROOT / "train_fabric_decoupled.py")]
    finished = run(fabric_run(1 + TRAINERS, *worker, *flags.split()), folder, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)

    def rows(rank, update):
        return [row.numpy().tobytes() for row in torch.load(folder / f"rank{rank}_{update}.pt")]

    deals = []
    for update in range(1, UPDATES + 1):
        places = {row: place for place, row in enumerate(rows(0, update))}
        assert len(places) == ROWS, "some rows cannot be told apart"
        deals.append([[places[row] for row in rows(rank, update)] for rank in range(1, 1 + TRAINERS)])
    return deals


def test_every_row_is_dealt_to_exactly_one_trainer_in_parts_that_differ_by_at_most_one(deals):
    for deal in deals:
        assert sorted(place for part in deal for place in part) == list(range(ROWS))
        assert [len(part) for part in deal] == [33, 32]


def test_the_part_of_a_trainer_is_new_in_every_update(deals):
    assert len({frozenset(deal[0]) for deal in deals}) == UPDATES


def test_the_rows_are_dealt_in_a_random_order(deals):
    """Neighbours in a random order of n rows are neighbours in number with probability 2/n: about twice in all."""
    for deal in deals:
        assert sum(abs(a - b) == 1 for part in deal for a, b in pairwise(part)) < 10
