"""Whatever ends a run: one line says so, no process is left, and what was learnt is on the disk."""

import os
import pstats
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.runs import differences, last_checkpoint, run_folders, tensors
from rl.run.ending import LAST_WRITES
from tests.launching import ROOT, Running, assert_no_process_is_left, fabric_run, python, run, torchrun

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
DDP = ("--accelerator=cpu", "--strategy=ddp")
HOST = re.escape(socket.gethostname())
PATIENCE = 120  # seconds for a run to end that nobody disturbs
LIMIT = 20  # seconds to end for one that is disturbed: a few on an idle machine, and far below --timeout
TIMEOUT = 5  # seconds that the processes of some runs wait for each other
LAUNCHERS_PATIENCE = 30  # seconds that torchrun grants a process that does not react to SIGTERM

UPDATES = 60  # of a run that comes to its end, but leaves time for a disturbance
FLAGS = ["--num-steps=128", "--update-epochs=1", "--test-episodes=1", "--hidden-sizes=16"]
SHORT = [*FLAGS, f"--total-timesteps={4 * 128}"]
LONG = [*FLAGS, f"--total-timesteps={UPDATES * 128}"]
ENDLESS = [*FLAGS, f"--total-timesteps={300 * 128}"]
RARELY = "--checkpoint-every=1000"
# An episode without an end, so that hundreds of pictures wait to be written when the run ends.
VIDEO = [*ENDLESS, "--env-id=Pendulum-v1", "--capture-video", "--env-kwargs", "max_episode_steps=100000"]
VIDEO_EPISODES = [*LONG, "--capture-video", "--num-envs=1"]


class Case(NamedTuple):
    command: list[str]
    meanwhile: Callable[[Running], Any] | None = None


def send(number: signal.Signals, rank: int) -> Callable[[Running], int]:
    """Send a signal to a rank in the middle of training, and return its process id."""

    def meanwhile(launch: Running) -> int:
        launch.wait_for(", update ")
        os.kill(process_id := launch.rank(rank), number)
        return process_id

    return meanwhile


def send_to_launcher(number: signal.Signals) -> Callable[[Running], None]:
    def meanwhile(launch: Running) -> None:
        launch.wait_for(", update ")
        launch.process.send_signal(number)

    return meanwhile


def wait_until_it_hangs(launch: Running) -> int:
    launch.wait_for(", update 2/")
    return launch.rank(1)


def wait_for_the_line(launch: Running) -> None:
    launch.wait_for("stopped by")


def delete_the_run(launch: Running) -> None:
    launch.wait_for(", update ")
    (folder,) = run_folders(launch.cwd)
    folder.rename(launch.cwd / "deleted")  # gone at once


def fill_the_disk(launch: Running) -> None:
    launch.wait_for(", update ")
    with pytest.raises(OSError, match="No space left"), (launch.cwd / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    launch.wait_for("warning: a checkpoint cannot be written")
    launch.wait_for("warning: the log cannot be written")


def fill_the_disk_for_a_while(launch: Running) -> None:
    fill_the_disk(launch)
    (launch.cwd / "filler").unlink()


def kill_before_it_joins(launch: Running) -> None:
    os.kill(rank_1 := launch.rank(1), signal.SIGSTOP)
    time.sleep(5)  # rank 0 comes and waits for it
    os.kill(rank_1, signal.SIGKILL)


def faulty(fault: str, rank: int = 0, index: int = 2, step: int = 40) -> list[str]:
    """The flags of a run with an environment that goes wrong; each process has 4, and then those of the test."""
    arguments = [f"fault={fault}", f"rank={rank}", f"index={index}", f"step={step}"]
    return [*SHORT, "--env-id=tests.faulty_env:Faulty-v0", "--env-kwargs", *arguments]


# The command, and the rank that is killed.
KILLED = {
    "torch": (torchrun(2, TORCH, *ENDLESS), 1),
    "player": (torchrun(2, DECOUPLED, *ENDLESS), 0),
    "lead trainer": (torchrun(2, DECOUPLED, *ENDLESS), 1),
    "trainer": (fabric_run(3, DECOUPLED, *ENDLESS), 2),
}
# Rank 1 of two falls silent: how, and what is said about it.
SILENT = {
    "a stopped process": (
        Case(torchrun(2, TORCH, *ENDLESS, f"--timeout={TIMEOUT}"), send(signal.SIGSTOP, 1)),
        r"is stopped and does not answer in update \d+",
    ),
    "a hanging environment": (
        Case(torchrun(2, TORCH, *faulty("hangs", rank=1), f"--timeout={TIMEOUT}"), wait_until_it_hangs),
        "does not answer in update 3; if it is only slow, raise --timeout",
    ),
}
# The command, and the signal that its first process receives.
SIGNALLED = {
    "python, SIGTERM": (python(TORCH, *LONG, RARELY), signal.SIGTERM),
    "python, SIGINT": (python(TORCH, *ENDLESS, RARELY), signal.SIGINT),
    "python, SIGHUP": (python(TORCH, *ENDLESS, RARELY), signal.SIGHUP),
    "python, SIGQUIT": (python(TORCH, *ENDLESS, RARELY), signal.SIGQUIT),
    "python, SIGINT, a long video": (python(TORCH, *VIDEO, RARELY), signal.SIGINT),
    "torchrun, SIGTERM": (torchrun(2, TORCH, *ENDLESS, RARELY), signal.SIGTERM),
    "fabric run, SIGINT": (fabric_run(2, DECOUPLED, *ENDLESS, RARELY), signal.SIGINT),
}
# The command, and what is said. With 4 environments in each of two processes, each environment takes 16 steps per
# update, and its step 40 is step 8 of update 3. With 4 in all it takes 32 steps per update.
FAULTY = {
    "a NaN reward": (
        torchrun(2, TORCH, *faulty("nan_reward", rank=1)),
        "environment 2 returned a NaN or infinite reward in step 8: nan (rank 1, update 3)",
    ),
    "an error in a reset": (
        torchrun(2, TORCH, *faulty("raises_in_reset", rank=1)),
        "environment 2 failed in step 8: ValueError: the pole is broken (rank 1, update 3)",
    ),
    "os._exit(0)": (
        python(TORCH, *faulty("exits_at_once")),
        "environment 2 failed in step 8: SystemExit: os._exit(0) (update 2)",
    ),
    "a loss beyond all bounds": (
        python(TORCH, *faulty("huge_reward")),
        "the gradient is NaN or infinite in update 2; the last checkpoint is from before",
    ),
    "a loss beyond all bounds, decoupled": (
        torchrun(2, DECOUPLED, *faulty("huge_reward")),
        "the gradient is NaN or infinite in update 2; the last checkpoint is from before",
    ),
}
IN_THE_LOG = {
    "a signal in the log": python(TORCH, *faulty("signal_in_the_log")),
    "a signal in the log, Fabric": python(FABRIC, *faulty("signal_in_the_log")),
    "a signal in the log, decoupled": torchrun(2, DECOUPLED, *faulty("signal_in_the_log")),
}
ON_A_SMALL_DISK = {
    "a full disk, decoupled, videos": Case(torchrun(2, DECOUPLED, *VIDEO_EPISODES), fill_the_disk),
    "a full disk": Case(python(TORCH, *LONG), fill_the_disk),
    "a disk full for a while": Case(python(FABRIC, *LONG), fill_the_disk_for_a_while),
}
CASES = {
    **{name: case for name, (case, _) in SILENT.items()},  # first, because these wait long
    **{name: Case(command, send(signal.SIGKILL, rank)) for name, (command, rank) in KILLED.items()},
    **{name: Case(command, send_to_launcher(number)) for name, (command, number) in SIGNALLED.items()},
    **{name: Case(command) for name, (command, _) in FAULTY.items()},
    **{name: Case(command, wait_for_the_line) for name, command in IN_THE_LOG.items()},
    **ON_A_SMALL_DISK,
    "sys.exit(0) in the test": Case(python(TORCH, *faulty("exits", index=4, step=0))),
    "a deleted run": Case(python(TORCH, *LONG), delete_the_run),
    "a restart": Case(torchrun(2, TORCH, *SHORT, options=("--max-restarts=1",)), kill_before_it_joins),
    "undisturbed": Case(python(TORCH, *LONG)),
    "undisturbed, 2 processes": Case(torchrun(2, TORCH, *SHORT)),
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A function that returns a folder on a disk of its own with little room."""
    disks = []

    def make():
        folder = tmp_path_factory.mktemp("disk")
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"a small disk cannot be made here: {mounted.stderr.strip()}")
        disks.append(folder)
        return folder

    yield make
    for folder in disks:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory, small_disk):
    """A function that returns a finished launch. What the selected tests need is launched once, three at a time."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {value for item in here for value in item.callspec.params.values()}

    def launch(name):
        command, meanwhile = CASES[name]
        cwd = small_disk() if name in ON_A_SMALL_DISK else tmp_path_factory.mktemp("launch")
        return run(command, cwd, PATIENCE, {"PYTHONPATH": str(ROOT)}, meanwhile)

    tmp_path_factory.getbasetemp()  # makes it, which threads must not do at once
    with ThreadPoolExecutor(3) as pool:
        futures = {name: pool.submit(launch, name) for name in CASES if name in wanted}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


def assert_one_line_says(finished, pattern):
    """The line comes before what a launcher says, which is the only one with a traceback."""
    assert finished.returncode != 0
    (line,) = [line for line in finished.output.splitlines() if line.startswith(("error: ", "stopped by "))]
    assert re.fullmatch(pattern, line)
    tracebacks = finished.output.partition(line)[2].count("Traceback")
    assert tracebacks == finished.output.count("Traceback") == (finished.command[0] != sys.executable), finished.output
    assert_no_process_is_left(finished)


def newest_checkpoint(cwd):
    (folder,) = run_folders(cwd)
    return last_checkpoint(folder)


def assert_equal_weights(actual, expected):
    assert actual["update"] == expected["update"]
    assert differences(actual, expected) == []


def update_in(line):
    return int(re.search(r"in update (\d+)", line)[1])


@pytest.mark.parametrize("name", KILLED)
def test_a_process_that_is_killed_is_named_and_the_others_end(finished, name):
    launch, rank = finished(name), KILLED[name][1]
    assert_one_line_says(launch, rf"error: rank {rank} \(process {launch.seen} on {HOST}\) died in update \d+")
    assert launch.seconds < LIMIT
    # The one that says so may be in the update before, or in the next.
    assert abs(newest_checkpoint(launch.cwd)["update"] + 1 - update_in(launch.error_lines[0])) <= 1


@pytest.mark.parametrize("name", SILENT)
def test_a_process_that_does_not_answer_is_named_and_the_others_end(finished, name):
    launch = finished(name)
    assert_one_line_says(launch, rf"error: rank 1 \(process {launch.seen} on {HOST}\) {SILENT[name][1]}")
    assert TIMEOUT < launch.seconds < TIMEOUT + LAUNCHERS_PATIENCE + LIMIT


@pytest.mark.parametrize("name", SIGNALLED)
def test_a_signal_ends_a_run_with_a_checkpoint_of_the_last_update_and_says_how_to_go_on(finished, name):
    launch, number = finished(name), SIGNALLED[name][1]
    (folder,) = run_folders(launch.cwd)
    resume = re.escape(str(folder.relative_to(launch.cwd)))
    assert_one_line_says(launch, rf"stopped by {number.name} in update \d+; go on with --resume {resume}")
    assert launch.seconds < LIMIT
    if launch.command[0] == sys.executable:
        assert launch.returncode == 128 + number
    assert update_in(launch.stderr) - newest_checkpoint(launch.cwd)["update"] in (0, 1)  # 0: as it was just done


@pytest.mark.parametrize("name", IN_THE_LOG)
def test_a_signal_that_comes_as_the_log_has_taken_a_lock_waits_until_it_is_given_back(finished, name):
    launch = finished(name)
    assert_one_line_says(launch, r"stopped by SIGTERM in update \d+; go on with --resume .*")
    assert launch.seconds < LAST_WRITES / 2  # after which another thread ends a process that hangs


@pytest.mark.parametrize(("name", "undisturbed"), [("python, SIGTERM", "undisturbed")])
def test_a_run_that_a_signal_ended_goes_on_as_if_it_had_not(finished, name, undisturbed, tmp_path):
    shutil.copytree(finished(name).cwd, tmp_path, dirs_exist_ok=True)
    assert newest_checkpoint(tmp_path)["update"] < UPDATES
    (folder,) = run_folders(tmp_path)
    assert run(python(TORCH, "--resume", str(folder)), tmp_path, PATIENCE).returncode == 0
    assert_equal_weights(newest_checkpoint(tmp_path), newest_checkpoint(finished(undisturbed).cwd))


@pytest.mark.parametrize("name", FAULTY)
def test_an_environment_or_a_loss_that_goes_wrong_is_named_and_taints_no_checkpoint(finished, name):
    launch, words = finished(name), FAULTY[name][1]
    assert_one_line_says(launch, re.escape(f"error: {words}"))
    checkpoint = newest_checkpoint(launch.cwd)
    assert checkpoint["update"] == int(re.search(r"update (\d+)", words)[1]) - 1
    assert all(value.isfinite().all() for value in tensors(checkpoint).values())


@pytest.mark.parametrize("name", ["sys.exit(0) in the test"])
def test_an_environment_that_exits_makes_no_run_a_success(finished, name):
    launch = finished(name)
    assert launch.returncode == 1
    assert launch.error_lines == ["error: environment 0 failed: SystemExit: 0 (update 4)"]


@pytest.mark.parametrize("name", ["a full disk"])
def test_a_full_disk_ends_a_run_only_when_it_is_done_and_leaves_the_checkpoint_before(finished, name):
    launch = finished(name)
    folder = run_folders(launch.cwd)[0].relative_to(launch.cwd) / "checkpoints"
    words = f"error: the last checkpoint cannot be written: make room in {folder}, then use --resume (update {UPDATES})"
    assert_one_line_says(launch, re.escape(words))
    assert launch.output.count("warning: ") == 2
    assert 1 <= newest_checkpoint(launch.cwd)["update"] < UPDATES


@pytest.mark.parametrize("name", ["a full disk, decoupled, videos"])
def test_a_full_disk_ends_no_run_that_records_videos_before_its_time(finished, name):
    launch = finished(name)
    assert launch.output.count("warning: a video cannot be written") == 1, launch.output
    assert_one_line_says(launch, f"error: the last checkpoint cannot be written: .* [(]rank 0, update {UPDATES}[)]")


@pytest.mark.parametrize("name", ["a deleted run"])
def test_a_run_whose_folder_is_deleted_ends_with_a_line_and_a_checkpoint(finished, name):
    launch = finished(name)
    (folder,) = run_folders(launch.cwd)
    words = f"error: the run's folder {re.escape(str(folder.relative_to(launch.cwd)))} was deleted, and its log is lost"
    assert_one_line_says(launch, words + r" \(update \d+\)")
    assert newest_checkpoint(launch.cwd)["update"] == int(re.search(r"update (\d+)\)", launch.error_lines[0])[1])


@pytest.mark.parametrize("name", ["a disk full for a while"])
def test_a_run_survives_what_happens_to_its_files_in_the_meantime(finished, name):
    launch = finished(name)
    assert launch.returncode == 0, launch.output
    assert launch.error_lines == []
    assert "Traceback" not in launch.output
    assert newest_checkpoint(launch.cwd)["update"] == UPDATES


@pytest.mark.parametrize(("name", "undisturbed"), [("a restart", "undisturbed, 2 processes")])
def test_a_process_that_is_killed_before_it_has_joined_is_restarted(finished, name, undisturbed):
    launch = finished(name)
    assert launch.returncode == 0, launch.output
    assert launch.output.count("mean return of") == 1
    assert_no_process_is_left(launch)
    assert_equal_weights(newest_checkpoint(launch.cwd), newest_checkpoint(finished(undisturbed).cwd))


SHELL = {
    "2>&1 | head -1": "2>&1 | head -1",
    "2>&-": "2>&-",
    ">&- 2>&-": ">&- 2>&-",
}


@pytest.mark.parametrize("name", SHELL)
def test_a_run_that_nobody_listens_to_any_more_comes_to_its_end(name, tmp_path):
    command = shlex.join(python(TORCH, *SHORT, "--exp-name=unheard"))
    script = f"{{ {command}; echo $? > code; }} {SHELL[name]}"
    finished = run(["bash", "-c", script], tmp_path, PATIENCE)
    assert (tmp_path / "code").read_text() == "0\n", finished.output
    assert newest_checkpoint(tmp_path)["update"] == 4
    assert "Traceback" not in finished.output
    assert {path.name for path in tmp_path.iterdir()} == {"code", "logs"}


def test_what_was_registered_with_atexit_is_done_and_a_profile_is_written(tmp_path):
    script = tmp_path / "train.py"
    registered = "import atexit\natexit.register(lambda: open('registered', 'w').close())\n"
    script.write_text(registered + (ROOT / TORCH).read_text())
    command = [sys.executable, "-m", "cProfile", "-o", "profile", str(script), *SHORT]
    finished = run(command, tmp_path, PATIENCE, {"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "registered").exists()
    assert "train.py" in str(pstats.Stats(str(tmp_path / "profile")).stats.keys())


SLOW_START = """
import os, runpy, sys, time
from rl.environments.collector import Collector

def restore_slowly(*args, restore=Collector.restore):
    if os.environ["RANK"] == "{rank}":
        print("slow", file=sys.stderr, flush=True)
        time.sleep({seconds})
    return restore(*args)

Collector.restore = restore_slowly
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module", params=[(TORCH, "--compile"), (DECOUPLED, "--no-compile")])
def to_be_resumed(request, tmp_path_factory):
    """A script, and the folder of a run of it on two processes that lacks its last update."""
    script, compile_or_not = request.param
    cwd = tmp_path_factory.mktemp("run")
    finished = run(torchrun(2, script, *SHORT, compile_or_not), cwd, PATIENCE)
    assert finished.returncode == 0, finished.output
    (folder,) = run_folders(cwd)
    (folder / "checkpoints" / "update_00000004.ckpt").unlink()
    return script, folder


def resume_slowly(to_be_resumed, tmp_path, rank, seconds, timeout, meanwhile=None):
    script, folder = to_be_resumed
    resumed = Path(shutil.copytree(folder, tmp_path / folder.name))
    (tmp_path / "slow.py").write_text(SLOW_START.format(seconds=seconds, rank=rank, script=str(ROOT / script)))
    command = torchrun(2, tmp_path / "slow.py", "--resume", str(resumed), f"--timeout={timeout}")
    return run(command, tmp_path, PATIENCE, {"PYTHONPATH": str(ROOT)}, meanwhile), resumed


def test_a_process_that_repeats_its_episodes_for_long_is_waited_for_longer_than_the_timeout(to_be_resumed, tmp_path):
    launch, resumed = resume_slowly(to_be_resumed, tmp_path, rank=0, seconds=16, timeout=8)
    assert launch.returncode == 0, launch.output
    assert (resumed / "checkpoints" / "update_00000004.ckpt").exists()


@pytest.mark.parametrize("to_be_resumed", [(TORCH, "--compile")], indirect=True)
def test_a_process_that_dies_while_another_waits_for_it_to_be_ready_is_named(to_be_resumed, tmp_path):
    def kill(launch):
        launch.wait_for("slow")
        time.sleep(5)  # rank 0 is ready, or will be soon
        os.kill(process_id := launch.rank(1), signal.SIGKILL)
        return process_id

    launch, _ = resume_slowly(to_be_resumed, tmp_path, rank=1, seconds=1000, timeout=60, meanwhile=kill)
    assert_one_line_says(launch, rf"error: rank 1 \(process {launch.seen} on {HOST}\) died before the first update")
    assert launch.seconds < LIMIT


def test_a_trainer_that_compiles_for_long_is_waited_for_longer_than_the_timeout(tmp_path):
    """A pause where the script compiles."""
    script, place = (ROOT / DECOUPLED).read_text(), "    gradient_step = compile_gradient_step("
    assert script.count(place) == 1
    (tmp_path / "slow.py").write_text(script.replace(place, f"    __import__('time').sleep(16)\n{place}"))
    command = torchrun(2, tmp_path / "slow.py", *FLAGS, "--total-timesteps=512", "--timeout=8")
    launch = run(command, tmp_path, PATIENCE, {"PYTHONPATH": str(ROOT)})
    assert launch.returncode == 0, launch.output
    assert newest_checkpoint(tmp_path)["update"] == 4
