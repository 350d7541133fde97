"""A run on two hosts equals the run of as many processes on one; when a part of it is lost, it ends or goes on."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launching import BIN, ROOT, assert_no_process_is_left, fabric_run, run, torchrun
from tests.test_equalities import Run, assert_bit_equal
from tests.two_hosts import ADDRESSES, launched, why_impossible

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
FLAGS = ["--num-envs=2", "--num-steps=128", "--total-timesteps=2560", "--test-episodes=1"]
FLAGS += ["--checkpoint-every=5", "--keep-checkpoints=1"]
LIMIT = 240  # seconds, for whatever a test waits for
TIMEOUT = 10  # seconds, after which ranks give up one that is silent
PORT = 29600  # any will do: a host has all its ports to itself


def torchrun_on(node, processes, script, *flags, options=()):
    options = [*options, "--nnodes=2", f"--nproc_per_node={processes}", "--rdzv-backend=c10d", "--rdzv-id=two_hosts"]
    options += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-conf=is_host={int(node == 0)}"]
    return [str(BIN / "torchrun"), *options, f"--local-addr={ADDRESSES[node]}", str(ROOT / script), *flags]


def fabric_run_on(node, processes, script, *flags, options=()):
    options = [*options, "--num-nodes=2", f"--node-rank={node}", f"--devices={processes}"]
    options += [f"--main-address={ADDRESSES[0]}", f"--main-port={PORT}"]
    return [str(BIN / "fabric"), "run", *options, str(ROOT / script), *flags]


def on_both(command_on, *arguments, **keywords):
    return [command_on(node, *arguments, **keywords) for node in range(2)]


ON_ONE_HOST = {"coupled": torchrun(2, TORCH, *FLAGS), "decoupled": fabric_run(4, DECOUPLED, *FLAGS)}
DDP = ["--accelerator=cpu", "--strategy=ddp"]
ON_TWO_HOSTS = {
    "torch": (on_both(torchrun_on, 1, TORCH, *FLAGS), "coupled"),
    "fabric": (on_both(fabric_run_on, 1, FABRIC, *FLAGS, options=DDP), "coupled"),
    "decoupled": (on_both(fabric_run_on, 2, DECOUPLED, *FLAGS), "decoupled"),
}


@pytest.fixture(scope="module", autouse=True)
def permission():
    if reason := why_impossible():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def one_host(permission, tmp_path_factory):
    """The runs on one host. The two coupled scripts compute the same, so one of them is enough."""
    root = tmp_path_factory.mktemp("one_host")

    def launch(name):
        (root / name).mkdir()
        finished = run(ON_ONE_HOST[name], root / name, LIMIT)
        assert finished.returncode == 0, finished.output
        return Run(root / name)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ON_ONE_HOST, pool.map(launch, ON_ONE_HOST), strict=True))


def wait_until_a_checkpoint_is_written(cwd, launchers):
    deadline = time.monotonic() + LIMIT
    while not list(cwd.glob("logs/*/*/checkpoints/*.ckpt")):
        ended = [launcher.result().output for launcher in launchers if launcher.done()]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.02)


@pytest.mark.parametrize("name", ON_TWO_HOSTS)
def test_a_run_on_two_hosts_equals_the_run_of_as_many_processes_on_one_bit_for_bit(name, one_host, tmp_path):
    commands, same = ON_TWO_HOSTS[name]
    with launched(commands, tmp_path, LIMIT) as (_, launchers):
        for launcher in launchers:
            finished = launcher.result()
            assert finished.returncode == 0, finished.output
            assert_no_process_is_left(finished)
    assert_bit_equal(Run(tmp_path), one_host[same])


def test_a_run_goes_on_by_itself_when_a_trainer_on_the_other_host_is_killed(one_host, tmp_path):
    commands = on_both(torchrun_on, 2, DECOUPLED, *FLAGS, options=["--max-restarts=3"])
    with launched(commands, tmp_path, LIMIT) as (hosts, launchers):
        wait_until_a_checkpoint_is_written(tmp_path, launchers)
        trainer, _ = hosts[1].ranks()
        os.kill(trainer, signal.SIGKILL)
        ended = [launcher.result() for launcher in launchers]
    for finished in ended:
        assert finished.returncode == 0, finished.output
        assert_no_process_is_left(finished)
    assert sum(finished.output.count("update 1/20,") for finished in ended) == 1  # it did not begin anew
    assert_bit_equal(Run(tmp_path), one_host["decoupled"])


def test_every_rank_ends_when_the_cable_is_cut(tmp_path):
    endless = ["--total-timesteps=100000000", "--no-compile", "--checkpoint-every=1", f"--timeout={TIMEOUT}"]
    with launched(on_both(torchrun_on, 1, TORCH, *endless), tmp_path, LIMIT) as (hosts, launchers):
        wait_until_a_checkpoint_is_written(tmp_path, launchers)
        assert [len(host.ranks()) for host in hosts] == [1, 1]
        hosts[0].cut_cable()
        deadline = time.monotonic() + TIMEOUT + 10
        while left := [rank for host in hosts for rank in host.ranks()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        ended = launchers[0].result()
        assert ended.returncode != 0
        # The other launcher may wait for the rendezvous on the first host for minutes, deaf to SIGTERM. That is
        # torchrun's doing, not ours; it is killed with its host.
    assert ended.error_lines or launchers[1].result().error_lines
