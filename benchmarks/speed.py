"""Training speed of our scripts, of other libraries, and of the parts of an update alone.

    python -m benchmarks.speed                                    # ours, and stable-baselines3 if it is installed here
    python -m benchmarks.speed --sheeprl PYTHON --torchrl PYTHON --sbx PYTHON
    python -m benchmarks.speed --cleanrl PYTHON --cleanrl-checkout FOLDER --purejaxrl PYTHON --purejaxrl-checkout FOLDER

PYTHON is the interpreter of an environment that holds the library, FOLDER one that holds cleanrl/ppo.py or
purejaxrl/ppo.py.

All do the same work: 8 environments, 2048 steps per update in all, networks of 64-64, one thread per process, and
minibatches of 64 rows in 10 epochs (A) or of 256 rows in 4 epochs (B). Each repeat runs everything once, so that what
else the machine does befalls all alike; the time of an update is the median of those of a run, ratios are those within
a repeat, and medians over the repeats are shown. Imports, compilation and the first updates are left out of the speed.
Every run is kept in a file of results, and a benchmark that was stopped goes on with it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks.figures import make_figure, save_figure
from benchmarks.rivals import NUM_ENVS, ROLLOUT_LENGTH, STEPS_PER_UPDATE

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WARM_UP = 4  # updates that are left out
LONGER = 4  # times as many updates of ours, so that they are measured about as long as the slower ones
ENV_IDS = ("LunarLander-v3", "CartPole-v1")
CONFIGS = {"A": (64, 10), "B": (256, 4)}  # rows of a minibatch, epochs
OURS = {
    "train_torch.py": [sys.executable, str(ROOT / "train_torch.py")],
    "train_fabric.py": [sys.executable, str(ROOT / "train_fabric.py")],
    "decoupled, 1 trainer": [str(BIN / "fabric"), "run", "--devices=2", str(ROOT / "train_fabric_decoupled.py")],
    "decoupled --overlap": [
        str(BIN / "fabric"),
        "run",
        "--devices=2",
        str(ROOT / "train_fabric_decoupled.py"),
        "--overlap",
    ],
    "train_torch.py x 2": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(ROOT / "train_torch.py")],
}
MAIN = "train_torch.py"
RIVALS = ("stable_baselines3", "cleanrl", "sheeprl", "torchrl")  # in PyTorch
SBX = "sbx"  # its update is compiled by JAX
PUREJAXRL = "purejaxrl"  # its environment, too, so there is no other than this one:
PUREJAXRL_ENV = "CartPole-v1"
STARTS = (MAIN, "train_fabric.py")  # whose start is measured, too: without compilation
START_SETTING = ("LunarLander-v3", "B")
PARTS = ("environment", "policy", "gradient", "all_reduce")


@dataclass
class Options:
    """Compare the training speed of our scripts with other libraries and with the parts of an update alone."""

    repeats: int = 5
    """How often everything is run."""
    updates: int = 16
    """Updates of each library's run; ours take four times as many. The first 4 are left out of the speed."""
    stable_baselines3: Path | None = Path(sys.executable) if find_spec("stable_baselines3") else None
    """Interpreter that has stable-baselines3."""
    sheeprl: Path | None = None
    """Interpreter that has SheepRL."""
    torchrl: Path | None = None
    """Interpreter that has TorchRL."""
    sbx: Path | None = None
    """Interpreter that has SBX."""
    cleanrl: Path | None = None
    """Interpreter that has what CleanRL's ppo.py needs."""
    cleanrl_checkout: Path | None = None
    """Folder that holds cleanrl/ppo.py."""
    purejaxrl: Path | None = None
    """Interpreter that has what PureJaxRL's ppo.py needs: distrax, flax, optax, gymnax below 1."""
    purejaxrl_checkout: Path | None = None
    """Folder that holds purejaxrl/ppo.py."""
    results: Path = Path("benchmarks/speed.jsonl")
    """File of results; without it everything is measured anew."""
    figure: Path | None = None
    """File of a figure to draw, for example assets/speed.svg (needs matplotlib)."""


class Finished(NamedTuple):
    """A run that has ended."""

    printed: str
    start: float  # when it was started, as `time.time` tells it
    memory: float  # the largest of its processes at its peak, in megabytes


def run(command: list[str], folder: Path) -> Finished:
    """Run a command in a folder.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        start = time.time()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{err.read()[-3000:]}")
        return Finished(out.read(), start, usage.ru_maxrss / 1024)


def run_ours(name: str, env_id: str, config: str, updates: int, *flags: str) -> dict[str, float]:
    """Run one of our scripts."""
    rows, epochs = CONFIGS[config]
    processes = 2 if name.endswith("x 2") else 1  # that share environments and minibatches
    work = {
        "env-id": env_id,
        "num-envs": NUM_ENVS // processes,
        "num-steps": STEPS_PER_UPDATE,
        "per-rank-batch-size": rows // processes,
        "update-epochs": epochs,
        "total-timesteps": updates * STEPS_PER_UPDATE,
        "test-episodes": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        finished = run([*OURS[name], *(f"--{flag}={value}" for flag, value in work.items()), *flags], Path(folder))
        (events,) = Path(folder).glob("logs/*/*/events*")
        logged = EventAccumulator(str(events)).Reload().Scalars("Loss/loss")
    return measures([event.wall_time - finished.start for event in logged], finished.memory)


def run_rival(name: str, python: Path, env_id: str, config: str, updates: int, *flags: str) -> dict[str, float]:
    """Run another library."""
    rows, epochs = CONFIGS[config]
    work = {"env-id": env_id, "minibatch-size": rows, "epochs": epochs, "updates": updates}
    command = [str(python.absolute()), str(ROOT / "benchmarks" / "rivals" / f"{name}.py")]
    with tempfile.TemporaryDirectory() as folder:
        finished = run([*command, *(f"--{flag}={value}" for flag, value in work.items()), *flags], Path(folder))
    lines = [json.loads(line) for line in finished.printed.splitlines()]
    return measures([line["seconds"] for line in lines if "update" in line], finished.memory)


def measures(times: list[float], memory: float) -> dict[str, float]:
    """Return steps per second, the seconds to the first update, and the memory in megabytes.

    Args:
        times: seconds from the start to the end of each update.
        memory: in megabytes.
    """
    update = median(end - start for start, end in pairwise(times[WARM_UP - 1 :]))
    return {"steps_per_second": STEPS_PER_UPDATE / update, "first_update": times[0], "memory": memory}


def run_ceiling(processes: int, env_id: str, config: str) -> dict[str, float]:
    """Return the steps per second of which an update would be capable that consisted of its parts alone."""
    rows, epochs = CONFIGS[config]
    launcher = [sys.executable] if processes == 1 else [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    gradient_steps = epochs * STEPS_PER_UPDATE // rows
    work = {
        "env-id": env_id,
        "num-envs": NUM_ENVS // processes,
        "minibatch-size": rows // processes,
        "gradient-steps": gradient_steps,
    }
    flags = [f"--{flag}={value}" for flag, value in work.items()]
    with tempfile.TemporaryDirectory() as folder:
        parts = json.loads(run([*launcher, "-m", "benchmarks.ceilings", *flags], Path(folder)).printed.splitlines()[-1])
    rollout = ROLLOUT_LENGTH * (parts["environment"] + parts["policy"])
    update = rollout + gradient_steps * (parts["gradient"] + parts.get("all_reduce", 0))
    return {"steps_per_second": STEPS_PER_UPDATE / update * 1e6, **parts}


def contestants(options: Options) -> dict[str, Callable[[str, str], dict[str, float]]]:
    """Return by name what is run, given an environment and a configuration."""
    runs: dict[str, Callable[[str, str], dict[str, float]]] = {}
    for name, python, *flags in (
        ("stable_baselines3", options.stable_baselines3),
        ("cleanrl", options.cleanrl, f"--checkout={(options.cleanrl_checkout or Path()).absolute()}", "--gymnasium"),
        ("sheeprl", options.sheeprl),
        ("torchrl", options.torchrl, "--compile"),
        (SBX, options.sbx),
        (PUREJAXRL, options.purejaxrl, f"--checkout={(options.purejaxrl_checkout or Path()).absolute()}"),
    ):
        if python:
            runs[name] = lambda *setting, name=name, python=python, flags=flags: run_rival(
                name, python, *setting, options.updates, *flags
            )
    for name in OURS:
        runs[name] = lambda *setting, name=name: run_ours(name, *setting, LONGER * options.updates, "--compile")
    for name in STARTS:
        runs[f"{name} --no-compile"] = lambda *setting, name=name: run_ours(name, *setting, WARM_UP + 1, "--no-compile")
    runs["parts alone"] = partial(run_ceiling, 1)
    runs["parts alone x 2"] = partial(run_ceiling, 2)
    return runs


def measure(options: Options) -> list[dict[str, Any]]:
    """Run what the file of results does not hold yet, and return all results."""
    runs = contestants(options)
    results = (
        [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    )
    known = {(result["repeat"], result["env_id"], result["config"], result["name"]) for result in results}
    jobs = [job for job in product(range(options.repeats), ENV_IDS, CONFIGS, runs) if job not in known]
    jobs = [job for job in jobs if not job[-1].endswith("--no-compile") or job[1:3] == START_SETTING]
    jobs = [job for job in jobs if job[-1] != PUREJAXRL or job[1] == PUREJAXRL_ENV]
    for repeat, env_id, config, name in tqdm(jobs, unit="run"):
        result = {"repeat": repeat, "env_id": env_id, "config": config, "name": name} | runs[name](env_id, config)
        results.append(result)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    return results


class Table:
    """Medians over the repeats, and medians of the ratios within a repeat."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        self.results = {
            (result["env_id"], result["config"], result["name"], result["repeat"]): result for result in results
        }
        self.repeats = sorted({result["repeat"] for result in results})
        self.names = list(dict.fromkeys(result["name"] for result in results))
        self.rivals = [name for name in self.names if name in RIVALS]
        self.sbx = [name for name in self.names if name == SBX]

    def values(self, setting: tuple[str, str], name: str, what: str = "steps_per_second") -> list[float]:
        """Return a value of each repeat."""
        return [self.results[*setting, name, repeat][what] for repeat in self.repeats]

    def best_rival(self, setting: tuple[str, str]) -> list[float]:
        """Return the steps per second of the fastest other library, which is that of the highest median."""
        return max((self.values(setting, name) for name in self.rivals), key=median)

    def print(self) -> None:
        """Print the tables in Markdown."""
        settings = list(product(ENV_IDS, CONFIGS))
        header = ["steps/s", *self.rivals, *self.sbx, MAIN]
        header += ["ratio to the best in PyTorch"] * bool(self.rivals) + [f"ratio to {name}" for name in self.sbx]
        header += ["its parts alone", "share of it"]
        _print_row(*header)
        _print_row(*["---"] * len(header))
        for setting in settings:
            ours, limit = self.values(setting, MAIN), self.values(setting, "parts alone")
            others = [self.best_rival(setting)] if self.rivals else []
            others += [self.values(setting, name) for name in self.sbx]
            ratios = [f"{_ratio(ours, other):.1f}" for other in others]
            medians = [f"{median(self.values(setting, name)):,.0f}" for name in (*self.rivals, *self.sbx, MAIN)]
            _print_row(", ".join(setting), *medians, *ratios, f"{median(limit):,.0f}", f"{_ratio(ours, limit):.2f}")
        if PUREJAXRL in self.names:
            print()
            _print_row("steps/s", f"{PUREJAXRL}, whose environment is compiled", MAIN)
            _print_row(*["---"] * 3)
            for setting in product((PUREJAXRL_ENV,), CONFIGS):
                _print_row(", ".join(setting), *(f"{median(self.values(setting, x)):,.0f}" for x in (PUREJAXRL, MAIN)))
        print()
        _print_row("steps/s", *OURS, "overlap / one process", "parts of two alone", "share of it")
        _print_row(*["---"] * (len(OURS) + 4))
        for setting in settings:
            one, two, limit = (self.values(setting, name) for name in (MAIN, f"{MAIN} x 2", "parts alone x 2"))
            overlap = _ratio(self.values(setting, "decoupled --overlap"), one)
            medians = [f"{median(self.values(setting, name)):,.0f}" for name in OURS]
            _print_row(
                ", ".join(setting), *medians, f"{overlap:.2f}", f"{median(limit):,.0f}", f"{_ratio(two, limit):.2f}"
            )
        print()
        _print_row("", "seconds to the first update", "megabytes")
        _print_row(*["---"] * 3)
        for name in (*self.rivals, *self.sbx, *(f"{name} --no-compile" for name in STARTS)):
            seconds, memory = (median(self.values(START_SETTING, name, what)) for what in ("first_update", "memory"))
            _print_row(name, f"{seconds:.1f}", f"{memory:.0f}")
        print()
        _print_row("microseconds", *PARTS)
        _print_row(*["---"] * (len(PARTS) + 1))
        for setting, name in product(settings, ("parts alone", "parts alone x 2")):
            shown = [part for part in PARTS if part in self.results[*setting, name, self.repeats[0]]]
            _print_row(
                ", ".join((*setting, name)), *(f"{median(self.values(setting, name, part)):.0f}" for part in shown)
            )


def _ratio(values: list[float], others: list[float]) -> float:
    return median(value / other for value, other in zip(values, others, strict=True))


def _print_row(*cells: str) -> None:
    print("|", " | ".join(cells), "|")


def draw(table: Table, path: Path) -> None:
    """Draw the steps per second of everybody, setting by setting."""
    settings = list(product(ENV_IDS, CONFIGS))
    figure, axes = make_figure(1, len(settings), (12, 3))
    names = [*table.rivals, *table.sbx, MAIN, "decoupled --overlap", "parts alone"]
    labels = [f"ours, {name}" if name in OURS else name for name in names]
    for axis, setting in zip(axes, settings, strict=True):
        speeds = [median(table.values(setting, name)) for name in names]
        colors = ["0.7"] * len(table.rivals + table.sbx) + ["tab:blue", "tab:cyan", "0.5"]
        bars = axis.barh(labels, speeds, color=colors)
        axis.bar_label(bars, [f" {value:,.0f}" for value in speeds], fontsize=8)
        axis.set(title=f"{setting[0]}, {setting[1]}", xlim=(0, max(speeds) * 1.3), xticks=[])
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        if axis is not axes[0]:
            axis.set_yticks([])
    figure.supxlabel("environment steps per second of training", fontsize=10)
    save_figure(figure, path)


def main(options: Options) -> None:
    """Measure, print and draw."""
    table = Table(measure(options))
    table.print()
    if options.figure:
        draw(table, options.figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
