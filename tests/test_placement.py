"""Each process of a machine computes on cores of its own."""

import os

import pytest

from rl.processes.placement import keep_to_own_cores
from rl.processes.ranks import Ranks


@pytest.fixture
def kept(monkeypatch):
    """A machine with some cores: returns those that each of its processes keeps to."""

    def keep(cores, num_processes):
        shares = []
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cores), raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", lambda process, mine: shares.append(list(mine)), raising=False)
        for local_rank in range(num_processes):
            keep_to_own_cores(Ranks(local_rank + 7, local_rank, num_processes + 7, num_processes))
        return shares

    return keep


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ([0, 1], [[0], [1]]),
        ([0, 1, 2, 3, 4], [[0, 1], [2, 3]]),
        ([4, 9, 12, 13], [[4, 9], [12, 13]]),  # what the process was given, not what the machine has
        ([3], [[3], [3]]),
    ],
)
def test_two_processes_share_the_cores_evenly(kept, cores, shares):
    assert kept(cores, 2) == shares


def test_processes_that_outnumber_the_cores_take_turns(kept):
    assert kept([0, 1], 5) == [[0], [1], [0], [1], [0]]


def test_a_single_process_keeps_all_cores(kept):
    assert kept([0, 1], 1) == []


def test_without_the_system_call_nothing_happens(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    keep_to_own_cores(Ranks(0, 0, 2, 2))
