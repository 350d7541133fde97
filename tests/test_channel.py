"""The channel alone, between real processes: what is sent is what arrives, where it should, and nowhere else."""

import pytest
import torch

from tests.launching import ROOT, WORKERS, assert_no_process_is_left, free_port, run, torchrun

NUM_ROWS = 10


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder where all processes kept what they sent and received, first four of them, then two."""
    folder = tmp_path_factory.mktemp("channel")
    command = torchrun(4, WORKERS / "exchange_messages.py", str(folder), str(NUM_ROWS), str(free_port()))
    finished = run(command, folder, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    refused = finished.stderr.count("after update 7 the ranks hold different weights")
    assert refused == 4 + 2, finished.output  # by every process of both worlds, on purpose
    return folder


@pytest.fixture(params=[3, 1], ids=["3 trainers", "1 trainer"])
def processes(request, kept):
    """What each process kept: the player's first, then the trainers'."""
    return [torch.load(kept / f"rank{rank}_of_{1 + request.param}.pt") for rank in range(1 + request.param)]


@pytest.fixture(params=[0, 1], ids=["first round", "second round"])
def messages(request, processes):
    """Of one round: the player's and the trainers'."""
    player, *trainers = (process["rounds"][request.param] for process in processes)
    return player, trainers


def test_the_weights_arrive_at_the_player_bit_for_bit(messages):
    player, trainers = messages
    assert not torch.equal(player["before"], trainers[0]["before"])
    assert torch.equal(player["after"], trainers[0]["before"])
    for trainer in trainers:
        assert torch.equal(trainer["after"], trainer["before"])


def test_the_parts_are_all_rows_in_order_each_once(messages):
    player, trainers = messages
    assert torch.equal(torch.cat([trainer["part"] for trainer in trainers]), player["rows"])


def test_the_sizes_of_the_parts_differ_by_at_most_one(messages):
    _, trainers = messages
    sizes = [len(trainer["part"]) for trainer in trainers]
    assert sizes == {3: [4, 3, 3], 1: [10]}[len(trainers)]


def test_with_shared_data_every_trainer_has_all_rows(messages):
    player, trainers = messages
    for trainer in trainers:
        assert torch.equal(trainer["all"], player["rows"])


def test_the_losses_are_summed_over_the_trainers(messages):
    player, trainers = messages
    assert player["losses"].dtype == torch.float64
    assert torch.equal(player["losses"], torch.stack([trainer["losses"] for trainer in trainers]).sum(0))


def test_the_state_for_a_checkpoint_arrives_at_the_player_bit_for_bit(processes):
    player, lead, *others = (process["state"] for process in processes)
    assert len(player) == len(lead) == 2 + 6
    for received, sent in zip(player, lead, strict=True):
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)
    assert all(not torch.equal(player[1], other[1]) for other in others)


def test_every_process_refuses_weights_that_differ_in_one_bit(processes):
    assert all(process["refuses"] for process in processes)
