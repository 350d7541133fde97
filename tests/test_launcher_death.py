"""Nothing is left behind when the launcher dies."""

import pytest

from tests.launching import Running, assert_no_process_is_left, fabric_run, run, torchrun

DDP = ("--accelerator=cpu", "--strategy=ddp")


def kill_the_launcher(launch: Running):
    launch.wait_for(", update ")
    assert launch.rank(0) != launch.rank(1)
    launch.process.kill()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(torchrun(2, "train_torch.py", "--total-timesteps=200000"), id="torchrun"),
        pytest.param(fabric_run(2, "train_fabric.py", "--total-timesteps=200000", options=DDP), id="fabric run"),
    ],
)
def test_ranks_end_with_a_launcher_that_is_killed(command, tmp_path):
    assert_no_process_is_left(run(command, tmp_path, timeout=10, meanwhile=kill_the_launcher))
