"""Kill training runs by SIGKILL: do they go on, and do they end as if nothing had happened?

    python -m benchmarks.faults

Each trial launches a command of the README on several processes, kills one of them, lets the launcher restart them
all, and compares the end with that of the undisturbed run of the same command. 70 % of the kills strike any process at
a random moment, its start-up included; 30 % strike the process that writes the checkpoints, in the middle of a write.

Each trial appends a line to the results, and the same command goes on with the trials that are missing; where none is,
it prints the table. For a new campaign remove the file of the results, or name another one. What a failed trial left
behind stays in the scratch folder.
"""

import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from benchmarks.dying import MOMENTS
from benchmarks.launches import BIN, free_port, launched
from benchmarks.runs import checkpoint_path, differences, last_checkpoint, run_folders, scalars

ROOT = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """A command that trains on several processes."""

    line: str  # as in the README; the campaign makes the run shorter
    own: str  # the environment that it trains on by itself
    others: tuple[str, ...] = ()  # those that it is given, too

    @property
    def processes(self) -> int:
        """How many processes the launcher starts."""
        return int(re.search(r"--(?:nproc_per_node|devices)=(\d+)", self.line)[1])


FLOAT64, SEEDED_ONCE, SAME_ARRAY = (f"tests.hard_envs:{name}-v0" for name in ("Float64", "SeededOnce", "SameArray"))
OTHERS = ("LunarLander-v2", "BipedalWalker-v3", FLOAT64, SEEDED_ONCE, SAME_ARRAY)
COMMANDS = {
    "raw PyTorch": Command(
        "torchrun --nproc_per_node=2 --standalone --max-restarts=3 train_torch.py", "CartPole-v1", OTHERS
    ),
    # Each of the 12 environments takes 43 steps before an update, which are not 512 but 516 in all.
    "raw PyTorch, steps rounded up": Command(
        "torchrun --nproc_per_node=3 --standalone train_torch.py", "CartPole-v1", ("LunarLander-v2", FLOAT64)
    ),
    "Fabric": Command("fabric run --accelerator=cpu --strategy=ddp --devices=2 train_fabric.py", "CartPole-v1", OTHERS),
    "Fabric, with videos": Command(
        "fabric run --accelerator=cpu --strategy=ddp --devices=2 train_fabric.py --capture-video "
        "--env-id LunarLander-v2 --total-timesteps 500000 --ortho-init --num-envs 2 --num-steps 2048 --seed 1",
        "LunarLander-v2",
    ),
    "decoupled": Command("fabric run --devices=3 train_fabric_decoupled.py --num-envs 4", "CartPole-v1", OTHERS),
    "decoupled, by torchrun": Command(
        "torchrun --nproc_per_node=3 train_fabric_decoupled.py", "CartPole-v1", (SAME_ARRAY,)
    ),
    "decoupled, with overlap": Command(
        "fabric run --devices=2 train_fabric_decoupled.py --preset lunar-lander --overlap",
        "LunarLander-v3",
        ("BipedalWalker-v3", SEEDED_ONCE),
    ),
}
ROWS = [(name, env_id) for name, command in COMMANDS.items() for env_id in (command.own, *command.others)]
PORTS = {"torchrun": "--master-port", "fabric": "--main-port"}  # two launches at once must not meet
UPDATES = 8
FLAGS = ("--num-steps=512", f"--total-timesteps={512 * UPDATES}", "--test-episodes=1")

SHARE_OF_WRITES = 0.3  # of all kills: those that strike in the middle of a checkpoint's write
LATEST = 0.9  # of the undisturbed run's duration: random moments end here, most runs a little later
TIMEOUT = 180  # seconds from the launch to the end
ATTEMPTS = 10  # at a kill that comes too late, because the run was faster than the undisturbed one

RANDOM = "random"
PROGRESS = re.compile(r"steps \d+/\d+, update (\d+)/")
CONTINUED = re.compile(r"restarted: going on after update (\d+) of")


@dataclass(frozen=True)
class Trial:
    """One kill."""

    number: int
    seed: int
    command: str  # its name in COMMANDS
    env_id: str
    rank: int  # of the process that is killed
    moment: str  # "random", or one of those in a checkpoint's write

    def draw(self, attempt: int) -> float:
        """Return a number of [0, 1), which says when to strike."""
        return random.Random(f"{self.seed} {self.number} {attempt}").random()


@dataclass
class Outcome:
    """What became of a run whose process was killed."""

    recovered: bool  # the launcher ended well, and the checkpoint of the last update is there
    weights_equal: bool  # the optimizer's state included
    logs_equal: bool  # every point of every scalar but times
    run_folders: int
    restarts: int
    left: int  # processes that outlived the launcher
    killed_after: float | None  # seconds from the appearance of the process
    continued_after: int  # the update whose checkpoint the run went on from; 0 if it began anew
    updates_redone: int  # those that had been shown as done; if there are none, the one under way at the kill counts
    seconds_to_update: float | None  # from the kill to the end of the first update after it, if one was left to do

    @property
    def tidy(self) -> bool:
        """Whether the kill caused one restart and nothing else: no other run, and no process that stays."""
        return (self.run_folders, self.restarts, self.left) == (1, 1, 0) and self.killed_after is not None

    @property
    def good(self) -> bool:
        """Whether all is as if nothing had happened."""
        return self.recovered and self.weights_equal and self.logs_equal and self.tidy


class Launched(NamedTuple):
    """A launch that has ended."""

    returncode: int
    start: float  # when the process that was to be killed appeared
    killed_at: float | None
    restarted_at: list[float]  # when the launcher had started that process again, and again
    end: float
    left: list[str]  # command lines of processes that outlived the launcher; they were killed
    lines: list[tuple[float, str]]  # what was written to stderr, and when


def draw_trials(kills: int, seed: int) -> list[Trial]:
    """Return the trials in random order; commands and environments, processes and moments take turns."""
    generator = random.Random(seed)
    ranks = {name: cycle(range(command.processes)) for name, command in COMMANDS.items()}
    moments = {name: cycle(MOMENTS) for name in COMMANDS}
    rows = (row for _ in count() for row in generator.sample(ROWS, len(ROWS)))
    writes = round(SHARE_OF_WRITES * kills)
    kinds = [
        *((name, env_id, 0, next(moments[name])) for name, env_id in islice(rows, writes)),
        *((name, env_id, next(ranks[name]), RANDOM) for name, env_id in islice(rows, kills - writes)),
    ]
    generator.shuffle(kinds)
    return [Trial(number, seed, *kind) for number, kind in enumerate(kinds, start=1)]


def command_line(name: str, env_id: str, wrapper: tuple[str, ...] = ()) -> list[str]:
    """Return the words of a command on an environment, for a short run.

    Args:
        name: of the command.
        env_id: is given to it only where it is not its own.
        wrapper: a script that runs the script.
    """
    line, own, _ = COMMANDS[name]
    launcher, script, flags = re.fullmatch(r"(.*?) (\w+\.py)(.*)", line).groups()
    program, *options = shlex.split(launcher)
    launch = [str(BIN / program), *options, f"{PORTS[program]}={free_port()}", *wrapper, str(ROOT / script)]
    return [*launch, *shlex.split(flags), *([] if env_id == own else [f"--env-id={env_id}"]), *FLAGS]


def launch(
    command: list[str], folder: Path, variables: dict[str, str], rank: int = 0, delay: float | None = None
) -> Launched:
    """Run a command in a new folder to its end, and leave no process behind.

    Args:
        command: a launcher's.
        folder: where it runs; its output goes into stdout.txt and stderr.txt.
        variables: of its environment.
        rank: of the process that is waited for.
        delay: seconds from the appearance of that process to its kill; it is not killed without.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    variables = {"PET_MAX_RESTARTS": "3"} | variables  # not every launcher has a flag for the number of restarts
    killed_at, restarted_at, lines = None, [], []
    deadline = time.monotonic() + TIMEOUT
    with (folder / "stdout.txt").open("w") as out, launched(command, folder, variables, out, subprocess.PIPE) as ours:

        def read_lines() -> None:
            lines.extend((time.monotonic(), line.decode(errors="replace")) for line in ours.process.stderr)

        def wait_for_rank(restarts: int) -> int | None:
            return ours.wait_for(lambda: ours.find_rank(rank, restarts), deadline - time.monotonic())

        reader = Thread(target=read_lines)
        reader.start()
        victim = wait_for_rank(0)
        start = time.monotonic()
        if victim is not None and delay is not None:
            with suppress(subprocess.TimeoutExpired):
                ours.process.wait(delay)
            with suppress(ProcessLookupError):  # it may have ended
                os.kill(victim, signal.SIGKILL)
                killed_at = time.monotonic()
        while wait_for_rank(len(restarted_at) + 1) is not None:
            restarted_at.append(time.monotonic())
        end = time.monotonic()
        left = ours.left()
    reader.join()  # all who could write are gone
    ours.process.stderr.close()
    (folder / "stderr.txt").write_text("".join(line for _, line in lines))
    return Launched(ours.process.returncode, start, killed_at, restarted_at, end, left, lines)


def reference_folder(command: str, env_id: str, scratch: Path) -> Path:
    """Return the folder of the undisturbed run."""
    return scratch / re.sub(r"\W+", "_", f"undisturbed {command} {env_id}")


def make_reference(command: str, env_id: str, scratch: Path) -> None:
    """Make the undisturbed run. The file with its duration is written last, so it says that the run is there.

    Raises:
        RuntimeError: if it fails, or does not take as many updates as it should.
    """
    folder = reference_folder(command, env_id, scratch)
    ended = launch(command_line(command, env_id), folder, {})
    if ended.returncode != 0 or not any(checkpoint_path(run, UPDATES).exists() for run in run_folders(folder)):
        raise RuntimeError(f"the undisturbed run of {command} on {env_id} did not end with update {UPDATES}: {folder}")
    (folder / "seconds.txt").write_text(str(ended.end - ended.start))


def run_trial(trial: Trial, scratch: Path) -> Outcome:
    """Launch a run, kill one of its processes, and compare the end with the undisturbed run.

    A run that ends well and was never restarted was missed by the kill; another moment is drawn.

    Raises:
        RuntimeError: if the run is missed again and again.
    """
    reference = reference_folder(trial.command, trial.env_id, scratch)
    folder = scratch / f"trial_{trial.number:03d}"
    for attempt in range(ATTEMPTS):
        ended = strike(trial, trial.draw(attempt), float((reference / "seconds.txt").read_text()), folder)
        if ended.restarted_at or ended.returncode != 0:
            outcome = judge(ended, folder, reference)
            if outcome.good:
                shutil.rmtree(folder)
            return outcome
    raise RuntimeError(f"{ATTEMPTS} kills struck nothing, see {folder}")


def strike(trial: Trial, drawn: float, seconds: float, folder: Path) -> Launched:
    """Launch a run and kill one of its processes at the moment that `drawn`, of [0, 1), says."""
    if trial.moment == RANDOM:
        delay = drawn * LATEST * seconds
        return launch(command_line(trial.command, trial.env_id), folder, {}, trial.rank, delay)
    marker = folder / "died"
    variables = {
        "DYING_MOMENT": trial.moment,
        "DYING_CHECKPOINT": f"update_{1 + int(drawn * UPDATES):08d}",
        "DYING_MARKER": str(marker),
    }
    wrapper = (str(ROOT / "benchmarks" / "dying.py"),)
    ended = launch(command_line(trial.command, trial.env_id, wrapper), folder, variables)
    return ended._replace(killed_at=float(marker.read_text()) if marker.exists() else None)


def judge(ended: Launched, folder: Path, reference: Path) -> Outcome:
    """Compare a run that was killed with the undisturbed one."""
    runs = run_folders(folder)
    recovered = ended.returncode == 0 and bool(runs) and checkpoint_path(runs[-1], UPDATES).exists()
    (expected,) = run_folders(reference)
    restarted_at = ended.restarted_at[0] if ended.restarted_at else math.inf
    progress = find_updates(PROGRESS, ended.lines)
    done = max((update for moment, update in progress if moment < restarted_at), default=0)
    continued_after = next((update for _, update in find_updates(CONTINUED, ended.lines)), 0)
    back_at = next((moment for moment, _ in progress if moment > restarted_at), None)
    return Outcome(
        recovered=recovered,
        weights_equal=recovered and not differences(last_checkpoint(runs[-1]), last_checkpoint(expected)),
        logs_equal=recovered and scalars(runs[-1], times=False) == scalars(expected, times=False),
        run_folders=len(runs),
        restarts=len(ended.restarted_at),
        left=len(ended.left),
        killed_after=round(ended.killed_at - ended.start, 2) if ended.killed_at else None,
        continued_after=continued_after,
        updates_redone=max(done - continued_after, min(1, UPDATES - continued_after)),
        seconds_to_update=round(back_at - ended.killed_at, 2) if back_at and ended.killed_at else None,
    )


def find_updates(pattern: re.Pattern, lines: list[tuple[float, str]]) -> list[tuple[float, int]]:
    """Return the numbers of updates in the lines that match, and when these were written."""
    return [(moment, int(found[1])) for moment, line in lines if (found := pattern.search(line))]


def print_table(results: list[dict[str, Any]]) -> None:
    """Print what became of the runs in Markdown: a row for each command and environment, the sum, and the commands."""
    print(
        "| command | environment | kills | in a write | gone on from a checkpoint | recovered | weights bit-equal ",
        end="",
    )
    print("| logs bit-equal | one run, one restart, no process left | updates redone, max ", end="")
    print("| seconds to the next update, median | max |")
    print("|" + " --- |" * 12)
    for name, env_id in ROWS:
        if group := [result for result in results if (result["command"], result["env_id"]) == (name, env_id)]:
            print_row([name, env_id.split(":")[-1]], group)
    print_row(["all", ""], results)
    print()
    for name, command in COMMANDS.items():
        print(f"- {name}: `{command.line}`")


def print_row(labels: list[str], results: list[dict[str, Any]]) -> None:
    """Print a row of the table."""
    trials, outcomes = (
        [kind(**{field.name: result[field.name] for field in fields(kind)}) for result in results]
        for kind in (Trial, Outcome)
    )
    counts = [
        sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("recovered", "weights_equal", "logs_equal", "tidy")
    ]
    in_writes = sum(trial.moment != RANDOM for trial in trials)
    continued = sum(outcome.continued_after > 0 for outcome in outcomes)
    redone = max(outcome.updates_redone for outcome in outcomes)
    seconds = [outcome.seconds_to_update for outcome in outcomes if outcome.seconds_to_update is not None]
    times = [f"{median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
    print("|", *(f"{cell} |" for cell in [*labels, len(results), in_writes, continued, *counts, redone, *times]))


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
    done = [Trial(**{field.name: result.get(field.name) for field in fields(Trial)}) for result in results]
    if not set(done) <= set(trials):
        sys.exit(
            f"error: {campaign.results} holds kills of another campaign: choose its --kills and --seed, or another file"
        )
    if not results:
        for row in ROWS:
            shutil.rmtree(reference_folder(*row, campaign.scratch), ignore_errors=True)
    with tqdm(total=len(trials), initial=len(done), unit=" kills") as bar:
        for trial in trials:
            if trial in done:
                continue
            if not (reference_folder(trial.command, trial.env_id, campaign.scratch) / "seconds.txt").exists():
                make_reference(trial.command, trial.env_id, campaign.scratch)
            result = asdict(trial) | asdict(run_trial(trial, campaign.scratch))
            results.append(result)
            with campaign.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            bar.update()
    print_table(results)


if __name__ == "__main__":
    main()
