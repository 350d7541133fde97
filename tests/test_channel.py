"""The channel alone, between real processes: what is sent is what arrives, where it should, and nowhere else."""

import pytest
import torch

from tests.launching import ROOT, WORKERS, assert_no_process_is_left, run, torchrun

NUM_ROWS = 10


@pytest.fixture(scope="module", params=[3, 1], ids=["3 trainers", "1 trainer"])
def processes(request, tmp_path_factory):
    """What each process kept of what it sent and received: the player's first, then the trainers'."""
    folder, world_size = tmp_path_factory.mktemp("channel"), 1 + request.param
    command = torchrun(world_size, WORKERS / "exchange_messages.py", str(folder), str(NUM_ROWS))
    finished = run(command, folder, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    refused = finished.stderr.count("after update 7 the ranks hold different weights")
    assert refused == world_size, finished.output  # by every process, on purpose
    return [torch.load(folder / f"rank{rank}_of_{world_size}.pt") for rank in range(world_size)]


@pytest.fixture(params=[("own parts", 0), ("own parts", 1), ("shared", 0), ("shared", 1)], ids=str)
def messages(request, processes):
    """Of one update: the player's and the trainers'."""
    way, number = request.param
    player, *trainers = (process[way][number] for process in processes)
    return player, trainers


def rows_of(packed):
    return [row.numpy().tobytes() for row in packed]


def test_the_weights_and_the_optimizers_state_arrive_at_the_player_bit_for_bit(messages):
    player, trainers = messages
    assert not torch.equal(player["before"], trainers[0]["before"])
    for trainer in trainers:
        assert torch.equal(trainer["after"], player["after"])
    assert all(state.any() for state in player["state"])
    for received, sent in zip(player["state"], trainers[0]["state"], strict=True):
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)


@pytest.mark.parametrize("messages", [("own parts", 0), ("own parts", 1)], indirect=True, ids=str)
def test_the_parts_hold_every_row_once_and_differ_by_at_most_one_in_size(messages):
    player, trainers = messages
    parts = [rows_of(trainer["rows"]) for trainer in trainers]
    assert sorted(row for part in parts for row in part) == sorted(rows_of(player["rows"]))
    assert [len(part) for part in parts] == {3: [4, 3, 3], 1: [10]}[len(trainers)]


@pytest.mark.parametrize("messages", [("shared", 0), ("shared", 1)], indirect=True, ids=str)
def test_with_shared_data_every_trainer_has_all_rows(messages):
    player, trainers = messages
    for trainer in trainers:
        assert torch.equal(trainer["rows"], player["rows"])


def test_the_losses_are_summed_over_the_trainers(messages):
    player, trainers = messages
    assert player["losses"].dtype == torch.float64
    assert torch.equal(player["losses"], torch.stack([trainer["losses"] for trainer in trainers]).sum(0))


def test_every_process_refuses_weights_that_differ_in_one_bit(processes):
    assert all(process["refuses"] for process in processes)
