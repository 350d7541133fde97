"""How well the scripts learn: runs of several seeds side by side, their tests, statistics and learning curves.

    python -m benchmarks.learning                                     # whatever the file of results lacks
    python -m benchmarks.learning --entries pendulum --seeds 1 2 3
    python -m benchmarks.learning --commands "train_torch.py --env-id Acrobot-v1" "train_torch.py --preset acrobot"
    python -m benchmarks.learning --entries --figure assets/learning.svg    # only what is there: tables and figure

Each run trains one seed, then tests 100 greedy episodes, whose seeds no training has. As many runs as there are cores
work at once, those of several processes accordingly fewer. A benchmark that was stopped goes on with the runs that
the file of results lacks. The runs' folders stay in benchmarks/runs.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks.figures import make_figure, save_figure
from rl.args import TorchArgs
from rl.presets import PRESETS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RUNS, RESULTS = ROOT / "benchmarks" / "runs", ROOT / "benchmarks" / "learning.jsonl"
WINDOW = 100  # training episodes over which a learning curve is averaged
EPISODES = 100  # of a test
TEST_SEED = 10_000  # and the run's seed: of a test
POINTS = 100  # of a learning curve, about so many are kept
RESAMPLES = 9999  # of a bootstrap
LEAST_SEEDS = 5  # of fewer there is no interval to speak of


class Entry(NamedTuple):
    """What is run for each seed."""

    env_id: str
    command: list[str]  # but for the seed
    processes: int = 1


def script_entry(command: str) -> Entry:
    """Return what is run for a command: a script, alone or after `torchrun` or `fabric run`."""
    words = shlex.split(command)
    given = dict(pairwise(re.split(r"[ =]", command)))
    env_id = PRESETS[given["--preset"]].flags["env_id"] if "--preset" in given else TorchArgs.env_id
    processes = given.get("--nproc_per_node") or given.get("--devices") or "1"
    start = [sys.executable] if words[0].startswith("train_") else [str(BIN / words.pop(0))]
    return Entry(given.get("--env-id", env_id), [*start, *words], int(processes))


def _stable_baselines3(env_id: str, settings: str) -> Entry:
    module = "benchmarks.learning_stable_baselines3"
    return Entry(env_id, [sys.executable, "-m", module, "--env-id", env_id, "--settings", settings])


FABRIC = [str(BIN / "fabric"), "run"]
COUPLED = "fabric run --accelerator=cpu --strategy=ddp --devices=2 train_fabric.py"
LUNAR_LANDER = "--env-id LunarLander-v2 --total-timesteps 500000 --ortho-init --num-envs 2 --num-steps 2048"
HALF_A_MILLION = "--total-timesteps 500000 --num-steps 2048 --learning-rate 1e-3 --ent-coef 0.003"
MINATAR, SPACE_INVADERS = "train_torch.py --preset minatar", "--env-id MinAtar/SpaceInvaders-v1"
COMMANDS = {name: f"train_torch.py --preset {name}" for name in PRESETS if name != "atari"} | {  # that one takes nights
    "lunar-lander-continuous, 500k": f"train_torch.py --preset lunar-lander-continuous {HALF_A_MILLION}",
    "minatar, SpaceInvaders": f"{MINATAR} {SPACE_INVADERS}",
    "minatar, 10M": f"{MINATAR} --total-timesteps 10000000",
    "minatar, SpaceInvaders, 10M": f"{MINATAR} {SPACE_INVADERS} --total-timesteps 10000000",
    # The commands of the README, with the scripts' defaults
    "train_torch.py x 2": "torchrun --nproc_per_node=2 --standalone train_torch.py",
    "train_fabric.py x 2": COUPLED,
    "train_fabric_decoupled.py x 3": "fabric run --devices=3 train_fabric_decoupled.py --num-envs 4",
}
ENTRIES = {name: script_entry(command) for name, command in COMMANDS.items()} | {
    # The README's command, whose environment is retired: its successor runs
    "LunarLander, train_fabric.py x 2": script_entry(f"{COUPLED} {LUNAR_LANDER}")._replace(env_id="LunarLander-v3"),
    # On two cores, against stable-baselines3
    "LunarLander, --overlap": script_entry(
        "fabric run --devices=2 train_fabric_decoupled.py --overlap --preset lunar-lander"
    ),
    "CartPole, stable-baselines3": _stable_baselines3("CartPole-v1", "published"),
    "LunarLander, stable-baselines3": _stable_baselines3("LunarLander-v3", "published"),
    "LunarLander, stable-baselines3, our settings": _stable_baselines3("LunarLander-v3", "ours"),
    "HalfCheetah, stable-baselines3": _stable_baselines3("HalfCheetah-v5", "published"),
    "Hopper, stable-baselines3": _stable_baselines3("Hopper-v5", "published"),
}
CURVES = {  # what is drawn together, and in which colour
    "CartPole-v1": {"cartpole": "tab:blue", "CartPole, stable-baselines3": "0.45"},
    "LunarLander-v3": {
        "lunar-lander": "tab:blue",
        "LunarLander, --overlap": "tab:cyan",
        "LunarLander, stable-baselines3": "0.45",
        "LunarLander, stable-baselines3, our settings": "tab:orange",
    },
    "HalfCheetah-v5": {"half-cheetah": "tab:blue", "HalfCheetah, stable-baselines3": "0.45"},
}
# Of RL Baselines3 Zoo (benchmark.md) and the agents of gymnax (README.md), and after how many steps, one seed each
PUBLISHED = {
    "CartPole-v1": "500 (100k)",
    "Acrobot-v1": "-73.5 (1M)",
    "Pendulum-v1": "-172 (100k)",
    "LunarLander-v3": "242 (1M, LunarLander-v2)",
    "LunarLanderContinuous-v3": "271 (1M, LunarLanderContinuous-v2)",
    "BipedalWalker-v3": "288 (5M)",
    "HalfCheetah-v5": "5,819 (1M, v4)",
    "Hopper-v5": "2,410 (1M, v4)",
    "Walker2d-v5": "3,479 (1M, v4)",
    "Ant-v5": "1,327 (1M, v4)",
    "MinAtar/Breakout-v1": "28 (10M, gymnax)",
    "MinAtar/SpaceInvaders-v1": "131 (10M, gymnax)",
}


@dataclass
class Options:
    """Train, test, compare."""

    entries: tuple[Literal[tuple(ENTRIES)], ...] = tuple(ENTRIES)
    """What is run: presets, commands of the README, stable-baselines3."""
    commands: tuple[str, ...] = ()
    """Commands of your own to run instead, each in quotes, without --seed; their results go to sweep.jsonl."""
    seeds: tuple[int, ...] = tuple(range(2001, 2011))
    """Seeds of the runs."""
    jobs: int = os.cpu_count() or 1
    """Processes that work at once."""
    results: Path | None = None
    """File of results; what it holds is not run again. By default benchmarks/learning.jsonl."""
    figure: Path | None = None
    """File of a figure to draw, for example assets/learning.svg (needs matplotlib)."""


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder and return what it prints.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def learning_curve(log: Path, start: float) -> list[tuple[int, float, float]]:
    """Return steps, seconds since the start, and the mean return of the last episodes, for each update of a run.

    Args:
        log: file of TensorBoard.
        start: when the run was started, as `time.time` tells it.
    """
    scalars = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    counts = {event.step: event.value for event in scalars.Scalars("Game/episodes")}
    updates = [event for event in scalars.Scalars("Rewards/rew_avg") if counts[event.step]]
    curve = []
    for last in range(len(updates)):
        # The log has means of updates, so the window begins with the update that makes it full.
        episodes = return_sum = 0.0
        for event in reversed(updates[: last + 1]):
            episodes += counts[event.step]
            return_sum += event.value * counts[event.step]
            if episodes >= WINDOW:
                curve.append((updates[last].step, updates[last].wall_time - start, return_sum / episodes))
                break
    return curve


def reward_threshold(env_id: str) -> float | None:
    """Return the mean return from which on an environment counts as solved, if it says so."""
    try:
        return gym.spec(env_id).reward_threshold
    except Exception:  # an id that is retired, or of a module that only the run finds
        return None


def train(name: str, seed: int, port: int) -> dict[str, Any]:
    """Train and test one seed, and return the result."""
    entry = ENTRIES[name]
    folder = RUNS / re.sub(r"[^\w.=-]+", "_", name)[:200] / f"seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    command = [str(ROOT / part) if part.startswith("train_") else part for part in entry.command]
    if command[: len(FABRIC)] == FABRIC:
        command.insert(len(FABRIC), f"--main-port={port}")
    start = time.time()
    printed = run([*command, "--seed", str(seed)], folder)
    version = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    if "stable_baselines3" in " ".join(command):
        result = json.loads(printed.splitlines()[-1])
    else:
        (log,) = folder.glob("logs/*/*/events*")
        scalars = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
        losses = scalars.Scalars("Loss/loss")
        test = [sys.executable, "-m", "rl.evaluate", str(log.parent), f"--episodes={EPISODES}"]
        words = run([*test, f"--seed={TEST_SEED + seed}"], folder).splitlines()[-1].split()
        mean, std, _ = (float(word.split("=")[1]) for word in words)
        result = {
            "steps": losses[-1].step,
            "seconds": losses[-1].wall_time - start,
            "curve": learning_curve(log, start),
            "mean_return": mean,
            "std_return": std,
            "largest_kl": max(event.value for event in scalars.Scalars("Info/approx_kl")),
        }
    curve = [(steps, round(seconds, 1), round(mean, 2)) for steps, seconds, mean in result["curve"]]
    threshold = reward_threshold(entry.env_id)
    solved = next((point for point in curve if threshold is not None and point[2] >= threshold), None)
    return {
        "entry": name,
        "seed": seed,
        "commit": version,  # of the code: seconds of different versions are not comparable
        **{what: round(result[what], 2) for what in ("mean_return", "std_return", "steps", "seconds")},
        "largest_kl": round(result["largest_kl"], 4) if "largest_kl" in result else None,
        "solved": solved and solved[:2],  # steps and seconds until the curve reached the environment's threshold
        "curve": curve[:: -(-len(curve) // POINTS) or 1],
    }


def measure(options: Options, path: Path) -> list[dict[str, Any]]:
    """Run what a file of results does not hold yet, and return all results."""
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(result["entry"], result["seed"]) for result in results}
    missing = [(name, seed) for seed in options.seeds for name in options.entries if (name, seed) not in known]
    missing.sort(key=lambda job: ENTRIES[job[0]].processes)
    with tqdm(total=len(missing), unit="run") as bar:
        for processes, jobs in groupby(missing, key=lambda job: ENTRIES[job[0]].processes):
            for result in _side_by_side(list(jobs), max(1, options.jobs // processes)):
                results.append(result)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                bar.set_postfix_str(f"{result['entry']}, seed {result['seed']}: {result['mean_return']:.1f}")
                bar.update()
    return results


def _side_by_side(jobs: list[tuple[str, int]], at_once: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(train, *job, 29_500 + number) for number, job in enumerate(jobs)]
        try:
            for done in as_completed(runs):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def interquartile_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of the middle half of the values, and its 95 % percentile bootstrap confidence interval.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
    """
    # SciPy has both, but where it is installed Lightning imports it, and each process starts a second later.
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(middle_mean(np.array(values)[draws]), [2.5, 97.5])
    return float(middle_mean(np.array(values))), float(low), float(high)


def middle_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of n values: [..., n] -> [...]."""
    quarter = values.shape[-1] // 4
    return np.sort(values)[..., quarter : values.shape[-1] - quarter].mean(-1)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the statistics over the seeds, in Markdown."""
    columns = ("", "environment", "steps", "seeds", "interquartile mean", "95 % interval", "lowest", "spread")
    columns += ("largest KL", "published", "seconds")
    print("|", " | ".join(columns), "|")
    print("|", " | ".join(["---"] * len(columns)), "|")
    for name, entry in ENTRIES.items():
        rows = [result for result in results if result["entry"] == name]
        if not rows:
            continue
        returns = [row["mean_return"] for row in rows]
        mean, low, high = interquartile_mean(returns)
        interval = f"{low:.1f} to {high:.1f}" if len(rows) >= LEAST_SEEDS else ""
        version = Counter(row["commit"] for row in rows).most_common(1)[0][0]
        seconds = median(row["seconds"] for row in rows if row["commit"] == version)
        cells = [name, entry.env_id, f"{rows[0]['steps']:,}", len(rows), f"{mean:.1f}", interval]
        spread = f"{(max(returns) - min(returns)) / abs(mean):.0%}"
        divergences = [row["largest_kl"] for row in rows if row.get("largest_kl")]
        divergence = f"{max(divergences):.3f}" if divergences else ""
        cells += [f"{min(returns):.1f}", spread, divergence, PUBLISHED.get(entry.env_id, "")]
        print("|", *(f"{cell} |" for cell in cells), f"{seconds:.0f} |")
    print()
    print("| seconds until 100 training episodes reach the threshold | threshold | by seed | median | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for env_id, names in CURVES.items():
        runs = {name: {row["seed"]: row for row in results if row["entry"] == name} for name in names}
        runs = {name: by_seed for name, by_seed in runs.items() if by_seed}
        seeds = sorted(set.intersection(*map(set, runs.values()))) if runs else []  # those that all have
        first = None
        for name in runs if seeds else ():
            rows = [runs[name][seed] for seed in seeds]
            seconds = [row["solved"][1] if row["solved"] else math.inf for row in rows]
            first = first or median(seconds)
            cells = [name, f"{gym.spec(env_id).reward_threshold:g}", ", ".join(map(_seconds, seconds))]
            ratio = median(seconds) / first
            cells += [_seconds(median(seconds)), f"{ratio:.1f}" if 0 < ratio < math.inf else ""]
            print("|", *(f"{cell} |" for cell in cells))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if math.isfinite(seconds) else "never"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the learning curves against steps and against seconds: each seed thin, their interquartile mean thick."""
    figure, axes = make_figure(len(CURVES), 2, (10, 3 * len(CURVES)))
    for row, (env_id, names) in zip(axes, CURVES.items(), strict=True):
        for column, unit in enumerate(("environment steps", "seconds, start and compilation included")):
            axis, ends = row[column], []
            for name, color in names.items():
                curves = [np.array(result["curve"]) for result in results if result["entry"] == name]
                if not curves:
                    continue
                for curve in curves:
                    axis.plot(curve[:, column], curve[:, 2], color=color, linewidth=0.4, alpha=0.5)
                # Until the median run ends; of one that has ended the last return stands.
                ends.append(median(curve[-1, column] for curve in curves))
                grid = np.linspace(max(curve[0, column] for curve in curves), ends[-1], 100)
                returns = [np.interp(grid, curve[:, column], curve[:, 2]) for curve in curves]
                axis.plot(
                    grid,
                    middle_mean(np.transpose(returns)),
                    color=color,
                    linewidth=2,
                    label=name if "stable" in name else f"ours, {name}",
                )
            axis.axhline(gym.spec(env_id).reward_threshold, color="0.8", linewidth=0.8, zorder=0)
            axis.set(xlabel=unit, ylabel=f"{env_id}\nreturn" if column == 0 else None)
            axis.set_xlim(0, 1.1 * max(ends, default=1))
            axis.spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def main(options: Options) -> None:
    """Measure, print and draw."""
    if options.commands:
        ENTRIES.update({command: script_entry(command) for command in options.commands})
    options.entries = options.commands or options.entries
    options.results = options.results or (Path("sweep.jsonl") if options.commands else RESULTS)
    results = measure(options, options.results)
    print_table(results)
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
