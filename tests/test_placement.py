"""Each process has a device, and computes on cores of its own."""

import os
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.accelerators import CUDAAccelerator
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch.distributed import Backend, HashStore

from rl.processes import placement
from rl.processes.placement import choose_device, compute_in_float32, keep_to_own_cores
from rl.voice import RunError


def launch(monkeypatch, rank, local_rank, world_size, local_world_size):
    """Pretend that a launcher has started this process."""
    values = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local_world_size}
    for name, value in (values | {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}).items():
        monkeypatch.setenv(name, str(value))


current = []  # the GPUs that processes made their own


def see_gpus(monkeypatch, number):
    """Pretend that PyTorch sees some GPUs; None if it was made for none."""
    device = None if number is None else torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)


@pytest.fixture
def placed(monkeypatch):
    """A function that returns where the processes of each machine compute: devices, and the one backend of each."""

    def place(num_gpus, machines, **apart):
        see_gpus(monkeypatch, num_gpus)
        monkeypatch.setattr(placement, "_holds_anywhere", lambda holds, world_size: holds)
        devices, backends, first = [], [], 0
        for processes in machines:
            here = []
            for local_rank in range(processes):
                launch(monkeypatch, first + local_rank, local_rank, sum(machines), processes)
                here.append(choose_device(True, **apart))
            devices.append([str(device) for device, _ in here])
            (backend,) = {backend for _, backend in here}
            backends.append(backend)
            first += processes
        return devices, backends

    return place


@pytest.mark.parametrize("backend", ["gloo", "shared"])
def test_without_the_flag_all_compute_on_the_cpu_however_many_gpus_there_are(monkeypatch, backend):
    monkeypatch.setitem(Backend.default_device_backend_map, "cpu", backend)  # "shared" after `use_shared_memory`
    see_gpus(monkeypatch, 8)
    launch(monkeypatch, 1, 1, 2, 2)
    assert choose_device(False) == (torch.device("cpu"), backend)


def test_each_process_has_a_gpu_of_its_own_on_every_machine(placed):
    assert placed(2, [2, 2]) == ([["cuda:0", "cuda:1"]] * 2, ["nccl", "nccl"])
    assert current[-4:] == [0, 1, 0, 1]
    assert placed(4, [3]) == ([["cuda:0", "cuda:1", "cuda:2"]], ["nccl"])


def test_the_gpu_of_each_process_is_the_one_that_fabric_would_choose(placed, monkeypatch):
    (devices, _), _ = placed(3, [3, 3])
    for local_rank, device in enumerate(devices):
        launch(monkeypatch, 3 + local_rank, local_rank, 6, 3)
        gpus = CUDAAccelerator.get_parallel_devices([0, 1, 2])
        strategy = DDPStrategy(parallel_devices=gpus, cluster_environment=TorchElasticEnvironment())
        assert str(strategy.root_device) == device


def test_processes_that_outnumber_the_gpus_share_them_through_gloo_and_the_first_says_so(placed, capsys):
    assert placed(2, [5]) == ([["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]], ["gloo"])
    assert capsys.readouterr().err == "5 processes share 2 GPUs: they talk through gloo, not NCCL\n"
    placed(1, [2])
    assert "2 processes share 1 GPU:" in capsys.readouterr().err


def test_machines_with_fewer_gpus_than_others_decide_for_all(monkeypatch):
    """Two machines of two processes, the second with one GPU."""
    store, heard = HashStore(), {}
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, None, None)]))

    def tell(rank):
        heard[rank] = placement._holds_anywhere(rank >= 2, 4)

    threads = [Thread(target=tell, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert heard == dict.fromkeys(range(4), True)
    see_gpus(monkeypatch, 2)
    launch(monkeypatch, 0, 0, 4, 2)
    monkeypatch.setattr(placement, "_holds_anywhere", lambda holds, world_size: True)
    assert choose_device(True) == (torch.device("cuda:0"), "gloo")


def test_a_player_stays_on_the_cpu_and_takes_no_gpu_from_the_trainers(placed, capsys):
    assert placed(2, [3], apart=1) == ([["cpu", "cuda:0", "cuda:1"]], ["nccl"])
    assert placed(1, [2, 1], apart=1) == ([["cpu", "cuda:0"], ["cuda:0"]], ["nccl", "nccl"])
    assert capsys.readouterr().err == ""
    assert placed(1, [3], apart=1) == ([["cpu", "cuda:0", "cuda:0"]], ["gloo"])


def test_a_player_on_a_gpu_takes_the_next_one_or_shares_one_and_the_trainers_keep_nccl(placed, capsys):
    gpus = {"apart": 1, "apart_on_gpu": True}
    assert placed(3, [3], **gpus) == ([["cuda:2", "cuda:0", "cuda:1"]], ["nccl"])
    assert placed(2, [3], **gpus) == ([["cuda:0", "cuda:0", "cuda:1"]], ["nccl"])
    assert capsys.readouterr().err == ""
    assert placed(1, [3], **gpus) == ([["cuda:0", "cuda:0", "cuda:0"]], ["gloo"])


def test_a_player_alone_on_its_machine_needs_no_gpu_there(monkeypatch):
    see_gpus(monkeypatch, 0)
    launch(monkeypatch, 0, 0, 3, 1)
    assert choose_device(True, apart=1) == (torch.device("cpu"), "nccl")
    with pytest.raises(RunError, match=r"^--cuda needs a GPU"):
        choose_device(True, apart=1, apart_on_gpu=True)


def test_one_process_needs_no_nccl(placed):
    assert placed(2, [1]) == ([["cuda:0"]], ["gloo"])


@pytest.mark.parametrize("num_gpus", [None, 0])  # none that this PyTorch could use, and none in the machine
def test_without_a_gpu_the_flag_is_answered_with_what_to_do(monkeypatch, num_gpus):
    see_gpus(monkeypatch, num_gpus)
    with pytest.raises(RunError, match=r"^--cuda needs a GPU, and PyTorch sees none: leave --cuda out"):
        choose_device(True)


@pytest.fixture
def kept(monkeypatch):
    """A machine with some cores: a function that returns those that each of its processes keeps to."""

    def keep(cores, num_processes):
        shares = []
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cores), raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", lambda process, mine: shares.append(list(mine)), raising=False)
        for local_rank in range(num_processes):
            launch(monkeypatch, local_rank + 7, local_rank, num_processes + 7, num_processes)
            keep_to_own_cores()
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
    launch(monkeypatch, 0, 0, 2, 2)
    keep_to_own_cores()


def test_a_gpu_rounds_to_float32_as_the_cpu_does(monkeypatch):
    for name in ("allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    compute_in_float32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default
    assert torch.backends.cudnn.deterministic
