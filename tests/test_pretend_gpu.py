"""The scripts on a GPU that is not there: everything lies where it should, and the numbers are those of the CPU."""

import ast
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from benchmarks.runs import differences, last_checkpoint, run_folders, scalars
from tests.launching import ROOT, WORKERS, python, run, torchrun

WORKER = WORKERS / "pretend_run.py"
UPDATES, MINIBATCHES = 2, 4  # of an update, for one process
FLAGS = ["--num-steps=256", "--total-timesteps=512", "--update-epochs=2", "--per-rank-batch-size=128"]
FLAGS += ["--test-episodes=1", "--max-test-steps=9", "--no-compile"]
ALL_ON_GPUS = ["--cuda", "--player-on-gpu"]
VECTOR = ["--env-id=Pendulum-v1", "--normalize-observations", "--normalize-rewards", "--target-kl=9", "--eval-every=2"]
IMAGE = ["--env-id=tests.spaces_env:PictureAndVector-v0", "--num-steps=32", "--total-timesteps=64"]
IMAGE += ["--per-rank-batch-size=16"]
FABRIC = {"LT_CLI_USED": "1", "LT_ACCELERATOR": "pretend", "LT_STRATEGY": "ddp"}
# Script, processes, flags, those that only the GPU has, GPUs
CASES = {
    "torch, 1 process, an image": ("train_torch.py", 1, IMAGE, ["--cuda"], 1),
    "torch, 2 processes": ("train_torch.py", 2, [*VECTOR, "--share-data"], ["--cuda"], 2),
    "fabric, 1 process": ("train_fabric.py", 1, VECTOR, [], 1),
    "fabric, 2 processes": ("train_fabric.py", 2, [], [], 2),
    "decoupled, two trainers, all on GPUs": (
        "train_fabric_decoupled.py",
        3,
        [*VECTOR, "--overlap"],
        ["--cuda", "--player-on-gpu"],
        3,
    ),
}
# How often a process waits besides, at most: to log, to compare weights and KL divergences, to write checkpoints
OTHER_WAITS = {
    "torch, 2 processes": 12,
    "fabric, 1 process": 9,
    "fabric, 2 processes": 5,
    "decoupled, two trainers, all on GPUs": 7,
}


def launch(script, processes, flags, cwd, worker=None, env=None):
    command = partial(python) if processes == 1 else partial(torchrun, processes)
    cwd.mkdir(parents=True)
    env = {"LT_DEVICES": str(processes), "PYTHONPATH": str(ROOT), **(env or {})}
    finished = run(command(worker or script, *FLAGS, *flags), cwd, timeout=400, env=env)
    assert finished.returncode == 0, finished.output
    (folder,) = run_folders(cwd)
    return folder, finished


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each case: its run on GPUs and what was printed, and its run on the CPU; two at a time."""
    root = tmp_path_factory.mktemp("runs")

    def case(name):
        script, processes, flags, gpu_flags, gpus = CASES[name]
        env = {"SCRIPT": str(ROOT / script), "PRETEND_GPUS": str(gpus)}
        fabric = FABRIC if script == "train_fabric.py" else {}
        on_cpu = fabric | {"LT_ACCELERATOR": "cpu"} if fabric else {}
        gpu = launch(script, processes, [*flags, *gpu_flags], root / name / "gpu", WORKER, env | fabric)
        return *gpu, launch(script, processes, flags, root / name / "cpu", env=on_cpu)[0]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(case, CASES), strict=True))


def counts(finished):
    """What each process counted."""
    return [ast.literal_eval(text) for text in re.findall(r"counted (\{.*\})", finished.stderr)]


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_gpus_equals_that_on_the_cpu_bit_for_bit(runs, name):
    gpu, finished, cpu = runs[name]
    assert len(counts(finished)) == CASES[name][1]
    assert sum(count.get("downloads", 0) for count in counts(finished)) > 0  # it did compute there
    assert differences(last_checkpoint(gpu), last_checkpoint(cpu)) == []
    assert scalars(gpu, times=False) == scalars(cpu, times=False)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_gpus_holds_tensors_of_the_cpu_alone(runs, name):
    gpu, _, _ = runs[name]
    for path in (gpu / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)  # this process has no such GPU


@pytest.mark.parametrize("name", OTHER_WAITS)
def test_the_cpu_waits_for_a_gpu_once_in_a_gradient_step_and_downloads_little_in_a_rollout(runs, name):
    _, finished, _ = runs[name]
    script, processes, *_ = CASES[name]
    steps = UPDATES * MINIBATCHES // (processes - ("decoupled" in script))
    for count in counts(finished):
        assert count.get("waits", 0) <= steps + OTHER_WAITS[name]
        assert count.get("downloads", 0) <= UPDATES * 100  # a rollout has 64 steps


def test_the_cpu_does_not_wait_for_a_gpu_in_a_compiled_gradient_step(tmp_path):
    env = {"SCRIPT": str(ROOT / "train_torch.py"), "PRETEND_GPUS": "1"}

    def waits(epochs):
        flags = [*IMAGE, f"--update-epochs={epochs}", "--compile", "--cuda"]
        _, finished = launch("train_torch.py", 1, flags, tmp_path / str(epochs), WORKER, env)
        assert "compiling" in finished.output and "without compilation" not in finished.output
        return counts(finished)[0]["waits"]

    with ThreadPoolExecutor(2) as pool:
        few, many = pool.map(waits, (1, 5))
    assert few == many  # those of the first step, which proves itself


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(tmp_path):
    program = """
import torch
from tests import pretend_gpu
pretend_gpu.install()
there = torch.ones(3, device="pretend")
here = torch.ones(3)
for wrong in (lambda: there + here, lambda: there.numpy(), lambda: torch.save(there, "x"), lambda: here.add_(there)):
    try:
        wrong()
    except Exception as error:
        print(type(error).__name__)
assert (there + 1).cpu().tolist() == [2, 2, 2] and (there + 1).device.type == "pretend"
"""
    (tmp_path / "program.py").write_text(program)
    finished = run(python(tmp_path / "program.py"), tmp_path, timeout=120, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert finished.stdout.split() == ["MixedDevices"] * 4
