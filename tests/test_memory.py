"""How many rollouts a process holds at the peak."""

import pytest

from tests.launching import ROOT, fabric_run, python, run
from tests.wide_env import WIDTH

FLAGS = [
    "--env-id=tests.wide_env:Wide-v0",
    "--num-envs=2",
    "--hidden-sizes",
    "4",
    "--update-epochs=1",
    "--test-episodes=1",
]
STEPS = (200, 6200)
UPDATES = 2
LAUNCHES = {"coupled": (python, "train_torch.py", 2.5), "player": (fabric_run, "train_fabric_decoupled.py", 3.0)}


def memory(name, flags, steps, folder):
    """Return the bytes that the process which runs the environments had at its peak."""
    launcher, script, _ = LAUNCHES[name]
    flags = [*FLAGS, *flags, f"--num-steps={steps}", f"--total-timesteps={UPDATES * steps}"]
    command = launcher(script, *flags) if launcher is python else launcher(2, script, *flags)
    folder.mkdir()
    finished = run(command, folder, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    return 1024 * int((folder / "memory").read_text())


@pytest.mark.parametrize(
    ("name", "flags"),
    [("coupled", ["--normalize-observations"]), ("player", ["--normalize-observations", "--overlap"])],
)
def test_at_the_peak_few_rollouts_are_alive(name, flags, tmp_path):
    small, large = (memory(name, flags, steps, tmp_path / str(steps)) for steps in STEPS)
    rollout = 4 * WIDTH * (STEPS[1] - STEPS[0])
    assert 1.5 < (large - small) / rollout < LAUNCHES[name][2]
