"""Kill training runs by SIGKILL: do they go on, and do they end as if nothing had happened?

    python -m benchmarks.faults

Each trial launches a script on several processes, kills one of them, lets the launcher restart them all, and compares
the end with that of the undisturbed run of the same command. 70 % of the kills strike any process at a random moment,
its start-up included; 30 % strike the process that writes the checkpoints, in the middle of a write.

Each trial appends a line to the results, and the same command goes on with the trials that are missing. What a failed
trial left behind stays in the scratch folder.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks.dying import MOMENTS

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # not resolved: in a virtual environment python is a link

ENVIRONMENTS = ("CartPole-v1", "LunarLander-v3", "BipedalWalker-v3")
PROCESSES = {"train_torch.py": 2, "train_fabric.py": 2, "train_fabric_decoupled.py": 3}
LAUNCHERS = {
    "train_torch.py": ("torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=3"),
    "train_fabric.py": ("fabric", "run", "--accelerator=cpu", "--strategy=ddp", "--devices=2"),
    "train_fabric_decoupled.py": ("fabric", "run", "--devices=3"),
}
UPDATES = 8
FLAGS = ("--num-steps=1024", f"--total-timesteps={1024 * UPDATES}", "--test-episodes=1")

SHARE_OF_WRITES = 0.3  # of all kills: those that strike in the middle of a checkpoint's write
LATEST = 0.9  # of the undisturbed run's duration: random moments end here, most runs a little later
TIMEOUT = 180  # seconds from the launch to the end
ATTEMPTS = 10  # at a kill that comes too late, because the run was faster than the undisturbed one

MARK = "PPO_FAULTS_LAUNCH"  # every process of a launch inherits this variable with a value of its own
RANDOM = "random"
PROGRESS = re.compile(r"steps \d+/\d+, update (\d+)/")
CONTINUED = re.compile(r"restarted: going on after update (\d+) of")


@dataclass(frozen=True)
class Trial:
    """One kill."""

    number: int
    seed: int
    script: str
    env_id: str
    rank: int  # of the process that is killed
    moment: str  # "random", or one of those in a checkpoint's write

    def draw(self, attempt: int) -> float:
        """Return a number of [0, 1), which says when to strike."""
        return random.Random(f"{self.seed} {self.number} {attempt}").random()


@dataclass
class Outcome:
    """What became of a run whose process was killed."""

    recovered: bool  # the launcher ended well, and one run's folder is there with the last update's checkpoint
    weights_equal: bool  # the optimizer's state included
    logs_equal: bool  # every point of every scalar but times
    restarts: int
    killed_after: float | None  # seconds from the appearance of the process
    updates_redone: int  # those that had been shown as done; if there are none, the one under way at the kill counts
    seconds_to_update: float | None  # from the kill to the end of the first update after it, if one was left to do

    @property
    def good(self) -> bool:
        """Whether all is as if nothing had happened."""
        return self.recovered and self.weights_equal and self.logs_equal


class Launched(NamedTuple):
    """A launch that has ended."""

    returncode: int
    start: float  # when the process that was to be killed appeared
    killed_at: float | None
    restarted_at: list[float]  # when the launcher had started that process again, and again
    end: float
    lines: list[tuple[float, str]]  # what was written to stderr, and when


def draw_trials(kills: int, seed: int) -> list[Trial]:
    """Return the trials in random order; scripts, environments, processes and moments take turns."""
    ranks = [(script, rank) for script, processes in PROCESSES.items() for rank in range(processes)]
    at_random = cycle((script, env_id, rank, RANDOM) for env_id, (script, rank) in product(ENVIRONMENTS, ranks))
    in_writes = cycle(
        (script, env_id, 0, moment)
        for env_id, shift in product(ENVIRONMENTS, range(len(MOMENTS)))
        for script, moment in zip(PROCESSES, MOMENTS[shift:] + MOMENTS[:shift], strict=True)
    )
    writes = round(SHARE_OF_WRITES * kills)
    kinds = [*islice(in_writes, writes), *islice(at_random, kills - writes)]
    random.Random(seed).shuffle(kinds)
    return [Trial(number, seed, *kind) for number, kind in enumerate(kinds, start=1)]


def command(script: str, env_id: str, wrapper: tuple[str, ...] = ()) -> list[str]:
    """Return the command that launches a script on the CPU, with four environments in all."""
    launcher, *options = LAUNCHERS[script]
    if launcher == "fabric":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            options.append(f"--main-port={listener.getsockname()[1]}")
    num_envs = 4 if script == "train_fabric_decoupled.py" else 2
    launch = [str(BIN / launcher), *options, *wrapper, str(ROOT / script)]
    return [*launch, f"--env-id={env_id}", f"--num-envs={num_envs}", *FLAGS]


def launch(
    command: list[str], folder: Path, env: dict[str, str], rank: int = 0, delay: float | None = None
) -> Launched:
    """Run a command in a new folder to its end, and leave no process behind.

    Args:
        command: a launcher's.
        folder: where it runs; its output goes into stdout.txt and stderr.txt.
        env: variables beside those of this process.
        rank: of the process that is waited for.
        delay: seconds from the appearance of that process to its kill; it is not killed without.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark = uuid4().hex
    # `fabric run` has no flag for the number of restarts, so PET_MAX_RESTARTS says it.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PET_MAX_RESTARTS": "3", MARK: mark} | env
    killed_at, restarted_at, lines = None, [], []
    deadline = time.monotonic() + TIMEOUT
    with (
        (folder / "stdout.txt").open("w") as stdout,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as launcher,
    ):
        reader = Thread(target=lambda: lines.extend((time.monotonic(), line) for line in launcher.stderr))
        reader.start()
        try:
            victim = find_process(launcher, rank, 0, deadline)
            start = time.monotonic()
            if victim is not None and delay is not None:
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(delay)
                with suppress(ProcessLookupError):  # it may have ended
                    os.kill(victim, signal.SIGKILL)
                    killed_at = time.monotonic()
            while find_process(launcher, rank, len(restarted_at) + 1, deadline) is not None:
                restarted_at.append(time.monotonic())
            end = time.monotonic()
        finally:
            kill_all(mark)
            reader.join()
    (folder / "stderr.txt").write_text("".join(line for _, line in lines))
    return Launched(launcher.returncode, start, killed_at, restarted_at, end, lines)


def find_process(launcher: subprocess.Popen, rank: int, restarts: int, deadline: float) -> int | None:
    """Wait for the process of a rank, after so many restarts, and return its id; None if none comes any more."""
    variables = {f"RANK={rank}".encode(), f"TORCHELASTIC_RESTART_COUNT={restarts}".encode()}
    while launcher.poll() is None and time.monotonic() < deadline:
        for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
            with suppress(OSError):  # a process may end while we look
                for child in children.read_text().split():
                    if variables <= set(Path(f"/proc/{child}/environ").read_bytes().split(b"\0")):
                        return int(child)
        time.sleep(0.02)
    return None


def kill_all(mark: str) -> None:
    """Kill every process with that mark. The launcher's group is not enough: ranks have sessions of their own."""
    while running := [process for process in Path("/proc").glob("[0-9]*") if carries(process, mark)]:
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.05)


def carries(process: Path, mark: str) -> bool:
    """Return whether a process, given by its folder in /proc, is alive and of the launch with that mark."""
    try:
        return f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours
        return False


def reference_folder(script: str, env_id: str, scratch: Path) -> Path:
    """Return the folder of the undisturbed run."""
    return scratch / f"undisturbed_{Path(script).stem}_{env_id}"


def make_reference(script: str, env_id: str, scratch: Path) -> None:
    """Make the undisturbed run. The file with its duration is written last, so it says that the run is there.

    Raises:
        RuntimeError: if it fails.
    """
    folder = reference_folder(script, env_id, scratch)
    launched = launch(command(script, env_id), folder, {})
    if launched.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed, see {folder}")
    (folder / "seconds.txt").write_text(str(launched.end - launched.start))


def run_trial(trial: Trial, scratch: Path) -> Outcome:
    """Launch a run, kill one of its processes, and compare the end with the undisturbed run.

    A run that ends well and was never restarted was missed by the kill; another moment is drawn.

    Raises:
        RuntimeError: if the run is missed again and again.
    """
    reference = reference_folder(trial.script, trial.env_id, scratch)
    folder = scratch / f"trial_{trial.number:03d}"
    for attempt in range(ATTEMPTS):
        launched = strike(trial, trial.draw(attempt), float((reference / "seconds.txt").read_text()), folder)
        if launched.restarted_at or launched.returncode != 0:
            outcome = judge(launched, folder, reference)
            if outcome.good:
                shutil.rmtree(folder)
            return outcome
    raise RuntimeError(f"{ATTEMPTS} kills struck nothing, see {folder}")


def strike(trial: Trial, drawn: float, seconds: float, folder: Path) -> Launched:
    """Launch a run and kill one of its processes at the moment that `drawn`, of [0, 1), says."""
    if trial.moment == RANDOM:
        delay = drawn * LATEST * seconds
        return launch(command(trial.script, trial.env_id), folder, {}, trial.rank, delay)
    marker = folder / "died"
    env = {
        "DYING_MOMENT": trial.moment,
        "DYING_CHECKPOINT": f"update_{1 + int(drawn * UPDATES):08d}",
        "DYING_MARKER": str(marker),
    }
    wrapper = (str(ROOT / "benchmarks" / "dying.py"),)
    launched = launch(command(trial.script, trial.env_id, wrapper), folder, env)
    return launched._replace(killed_at=float(marker.read_text()) if marker.exists() else None)


def judge(launched: Launched, folder: Path, reference: Path) -> Outcome:
    """Compare a run that was killed with the undisturbed one."""
    runs = run_folders(folder)
    recovered = launched.returncode == 0 and len(runs) == 1 and last_checkpoint(runs[0]).exists()
    (expected,) = run_folders(reference)
    restarted_at = launched.restarted_at[0] if launched.restarted_at else math.inf
    progress = find_updates(PROGRESS, launched.lines)
    done = max((update for moment, update in progress if moment < restarted_at), default=0)
    continued_after = next((update for _, update in find_updates(CONTINUED, launched.lines)), 0)
    back_at = next((moment for moment, _ in progress if moment > restarted_at), None)
    return Outcome(
        recovered=recovered,
        weights_equal=recovered and have_equal_weights(runs[0], expected),
        logs_equal=recovered and scalars(runs[0]) == scalars(expected),
        restarts=len(launched.restarted_at),
        killed_after=round(launched.killed_at - launched.start, 2) if launched.killed_at else None,
        updates_redone=max(done - continued_after, min(1, UPDATES - continued_after)),
        seconds_to_update=round(back_at - launched.killed_at, 2) if back_at and launched.killed_at else None,
    )


def find_updates(pattern: re.Pattern, lines: list[tuple[float, str]]) -> list[tuple[float, int]]:
    """Return the numbers of updates in the lines that match, and when these were written."""
    return [(moment, int(found[1])) for moment, line in lines if (found := pattern.search(line))]


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs that were started in a folder."""
    return list(folder.glob("logs/*/*"))


def last_checkpoint(run_folder: Path) -> Path:
    """Return the path of the checkpoint of the last update."""
    return run_folder / "checkpoints" / f"update_{UPDATES:08d}.ckpt"


def have_equal_weights(run_folder: Path, other: Path) -> bool:
    """Return whether two runs ended with the same agent and the same state of the optimizer, bit for bit."""
    one, two = (torch.load(last_checkpoint(run), weights_only=True) for run in (run_folder, other))
    return all(are_equal(one[key], two[key]) for key in ("agent", "optimizer"))


def are_equal(one: Any, two: Any) -> bool:
    """Compare nested dictionaries and lists whose leaves are tensors or plain values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(are_equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(are_equal, one, two))
    return one == two


def scalars(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of every scalar but times, as TensorBoard shows them."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("Time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def print_table(results: list[dict[str, Any]]) -> None:
    """Print what became of the runs in Markdown: a row for each script, environment and kind of kill, and the sum."""
    print("| script | environment | killed | kills | recovered | weights bit-equal | logs bit-equal ", end="")
    print("| updates redone, max | seconds to the next update, median | max |")
    print("|" + " --- |" * 10)
    for script, env_id, in_write in product(PROCESSES, ENVIRONMENTS, (False, True)):
        kind = (script, env_id, in_write)
        if group := [r for r in results if (r["script"], r["env_id"], r["moment"] != RANDOM) == kind]:
            print_row([script, env_id, "in a checkpoint's write" if in_write else "at a random moment"], group)
    print_row(["all", "", ""], results)


def print_row(labels: list[str], results: list[dict[str, Any]]) -> None:
    """Print a row of the table."""
    counts = [sum(result[name] for result in results) for name in ("recovered", "weights_equal", "logs_equal")]
    redone = max(result["updates_redone"] for result in results)
    seconds = [result["seconds_to_update"] for result in results if result["seconds_to_update"] is not None]
    times = [f"{median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
    print("|", *(f"{cell} |" for cell in [*labels, len(results), *counts, redone, *times]))


@dataclass
class Campaign:
    """Kill training runs by SIGKILL, and compare how they end with runs that nobody killed."""

    kills: int = 100
    """Number of kills."""
    seed: int = 1
    """Who is killed, and when, derives from it."""
    results: Path = Path("benchmarks/faults.jsonl")
    """One line of JSON for each kill. A campaign that was stopped goes on where this file ends."""
    scratch: Path = Path(tempfile.gettempdir()) / "ppo_faults"
    """Folder of the undisturbed runs, which a new campaign makes anew, and of the trials that failed."""


def main() -> None:
    """Run a campaign, or what is left of it, from the command line."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # no word about each restart that it finds in the logs
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no process behind either
    campaign = tyro.cli(Campaign, description=Campaign.__doc__)
    trials = draw_trials(campaign.kills, campaign.seed)
    results = (
        [json.loads(line) for line in campaign.results.read_text().splitlines()] if campaign.results.exists() else []
    )
    done = [Trial(**{field.name: result[field.name] for field in fields(Trial)}) for result in results]
    if not set(done) <= set(trials):
        sys.exit(
            f"error: {campaign.results} holds kills of another campaign: choose its --kills and --seed, or another file"
        )
    if not results:
        for script, env_id in product(PROCESSES, ENVIRONMENTS):
            shutil.rmtree(reference_folder(script, env_id, campaign.scratch), ignore_errors=True)
    with tqdm(total=len(trials), initial=len(done), unit=" kills") as bar:
        for trial in trials:
            if trial in done:
                continue
            if not (reference_folder(trial.script, trial.env_id, campaign.scratch) / "seconds.txt").exists():
                make_reference(trial.script, trial.env_id, campaign.scratch)
            result = asdict(trial) | asdict(run_trial(trial, campaign.scratch))
            results.append(result)
            with campaign.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            bar.update()
    print_table(results)


if __name__ == "__main__":
    main()
