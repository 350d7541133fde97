"""E7: a run whose gradient step is compiled learns what a run without compilation learns, but for rounding.

The real scripts run twice, on one process and on several. Their last checkpoints and their logs are compared.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from benchmarks.runs import last_checkpoint, run_folders, scalars, tensors
from tests.launching import ROOT, assert_no_process_is_left, fabric_run, python, run, torchrun

TORCH, FABRIC = "train_torch.py", "train_fabric.py"
DDP = ("--accelerator=cpu", "--strategy=ddp")
SPACES = "--env-id=tests.spaces_env"
# A process may have to wait until another has compiled, on a busy machine.
FLAGS = "--num-envs=1 --hidden-sizes=16 --update-epochs=1 --per-rank-batch-size=16 --test-episodes=1 --timeout=240"
LOOSE, TIGHT = "--max-grad-norm=1000", "--max-grad-norm=0.1"  # the one clips no gradient, the other does

CASES = {
    # MultiDiscrete actions. Minibatches of 13 and 12 rows; ratios and values leave their narrow bounds.
    "torch 1": (
        python,
        TORCH,
        f"{SPACES}:Grid-v0 --num-steps=50 --clip-vloss --clip-coef=0.01 --learning-rate=0.01 --ent-coef=0.01 {TIGHT}",
    ),
    # MultiBinary actions. The first update ends after two of three epochs, with a divergence of 0.009.
    "torch 2": (
        partial(torchrun, 2),
        TORCH,
        f"{SPACES}:Switches-v0 --num-steps=64 --normalize-observations --normalize-rewards --update-epochs=3 "
        f"--target-kl=0.005 --learning-rate=0.01 {LOOSE}",
    ),
    # Continuous actions. Minibatches of 26 and 25 rows, of which the ranks take 9 or 8.
    "torch 3, shared": (partial(torchrun, 3), TORCH, f"{SPACES}:Motors-v0 --num-steps=51 --share-data {TIGHT}"),
    # A Dict with an image.
    "fabric 2": (
        partial(fabric_run, 2, options=DDP),
        FABRIC,
        f"{SPACES}:PictureAndVector-v0 --num-steps=64 --ent-coef=0.01 {LOOSE}",
    ),
}
UPDATES = 2
# Of the norm of each tensor. Measured were at most 9e-7 for Adam's moments and 3e-6 for a weight. A gradient that is a
# sum over two ranks instead of their mean doubles one moment and quadruples the other.
RELATIVE_TOLERANCE = 1e-4


def launch(name, compile_or_not, folder):
    command, script, flags = CASES[name]
    folder.mkdir()
    flags = [*FLAGS.split(), *flags.split(), compile_or_not]
    num_steps = next(int(flag.partition("=")[2]) for flag in flags if flag.startswith("--num-steps"))
    command = command(script, *flags, f"--total-timesteps={UPDATES * num_steps}")
    finished = run(command, folder, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert_no_process_is_left(finished)
    return finished


def learnt(finished):
    """All numbers that the last checkpoint holds, and all that were logged but for the times."""
    (folder,) = run_folders(finished.cwd)
    checkpoint = last_checkpoint(folder)
    assert checkpoint["update"] == UPDATES
    return tensors(checkpoint), scalars(folder, times=False)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_run_learns_what_a_plain_run_learns_but_for_rounding(name, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        compiled, plain = pool.map(
            partial(launch, name), ("--compile", "--no-compile"), (tmp_path / "compiled", tmp_path / "plain")
        )
    assert "without compilation" not in compiled.output, compiled.output
    assert "compiling the gradient step" not in plain.output, plain.output
    assert compiled.output.count("compiling the gradient step") == 1, compiled.output

    (numbers, logged), (other_numbers, other_logged) = learnt(compiled), learnt(plain)
    assert numbers.keys() == other_numbers.keys() and logged.keys() == other_logged.keys()
    differences = {}
    for key, other in other_numbers.items():
        difference, size = (numbers[key].double() - other.double()).norm().item(), other.double().norm().item()
        assert difference <= RELATIVE_TOLERANCE * size, f"{key} differs by {difference} of {size}"
        differences[key] = difference
    assert any(differences.values()), "to the bit: one of them was not compiled"
    for tag, points in other_logged.items():
        for (step, value), (other_step, other_value) in zip(logged[tag], points, strict=True):
            # A mean of advantages is close to zero: what is left is rounding.
            assert step == other_step and value == pytest.approx(other_value, rel=RELATIVE_TOLERANCE, abs=1e-6), tag
