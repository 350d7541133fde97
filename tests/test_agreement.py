"""Where the weights of one process change in a single bit, the run ends after that update and says so."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.launching import ROOT, WORKERS, assert_no_process_is_left, fabric_run, run, torchrun

TORCH, DECOUPLED = "train_torch.py", "train_fabric_decoupled.py"
UPDATES = 3
# One gradient step in each update.
FLAGS = "--num-steps 64 --per-rank-batch-size 64 --update-epochs 1 --num-envs 2 --hidden-sizes 16 --test-episodes 1"
FIRST, LAST = 1, UPDATES


class Case(NamedTuple):
    script: str
    rank: int  # whose weights change
    update: int  # in which they do


CASES = [
    Case(TORCH, rank=1, update=FIRST),
    Case(DECOUPLED, rank=0, update=FIRST),  # the player
    Case(DECOUPLED, rank=2, update=LAST),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every case, launched two at a time."""

    def launch(case):
        flags = [*FLAGS.split(), f"--total-timesteps={64 * UPDATES}", "--no-compile"]
        worker = [WORKERS / "damage_weights.py", str(case.rank), str(case.update), str(ROOT / case.script), *flags]
        command = {
            TORCH: lambda: torchrun(2, *worker),
            DECOUPLED: lambda: fabric_run(3, *worker),
        }[case.script]
        return run(command(), tmp_path_factory.mktemp("agreement"), timeout=120, env={"PYTHONPATH": str(ROOT)})

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(launch, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_process_whose_weights_change_in_one_bit_ends_the_run(finished, case):
    launch = finished[case]
    assert launch.returncode != 0, launch.output
    assert len(launch.error_lines) == 1, launch.output
    assert f"error: after update {case.update} the ranks hold different weights (rank" in launch.error_lines[0]
    assert "mean return" not in launch.output
    assert_no_process_is_left(launch)
