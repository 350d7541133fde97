"""The same work on more processes: the README's LunarLander command on one process and on two, coupled and decoupled.

    python -m benchmarks.processes

All have 4 environments, 2048 steps per update, and minibatches of 128 rows over all processes. Each repeat runs
everything once, so that what else the machine does befalls all alike; the time of an update is the median of those of
a run without the first ten, ratios are those within a repeat, and medians over the repeats are shown. Two runs that
know nothing of each other, each with half of the work, show what the machine's second core is worth.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import tyro
from tqdm import tqdm

from benchmarks.raw import keep
from benchmarks.runs import run_folders, scalars
from benchmarks.speed import BIN, ROOT, run

STEPS, ENVS, ROWS = 2048, 4, 128
WARM_UP, UPDATES = 10, 40
FABRIC, DECOUPLED = str(ROOT / "train_fabric.py"), str(ROOT / "train_fabric_decoupled.py")
COUPLED = (str(BIN / "fabric"), "run", "--accelerator=cpu", "--strategy=ddp")
APART = (str(BIN / "fabric"), "run")
ONE, STRANGERS = "one process", "two runs of half the size, without a word"
# The command, and how many of its processes run environments and optimize.
COMMANDS = {
    ONE: ((str(BIN / "python"), FABRIC), 1, 1),
    "two processes": ((*COUPLED, "--devices=2", FABRIC), 2, 2),
    "player and one trainer": ((*APART, "--devices=2", DECOUPLED), 1, 1),
    "player and two trainers": ((*APART, "--devices=3", DECOUPLED), 1, 2),
    "player and one trainer, --overlap": ((*APART, "--devices=2", DECOUPLED, "--overlap"), 1, 1),
}


def steps_per_second(name: str) -> float:
    """Return the environment steps per second of a command, by the median update of its run."""
    if name == STRANGERS:
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(lambda _: run_once(*COMMANDS[ONE], parts=2), range(2)))
    return run_once(*COMMANDS[name])


def run_once(command: tuple[str, ...], players: int, optimizers: int, parts: int = 1) -> float:
    """Return the environment steps per second of a run that does one of so many equal parts of the work."""
    steps = STEPS // parts
    flags = ["--env-id=LunarLander-v3", "--ortho-init", f"--num-steps={steps}", f"--total-timesteps={UPDATES * steps}"]
    flags += [f"--num-envs={ENVS // players // parts}", f"--per-rank-batch-size={ROWS // optimizers // parts}"]
    with tempfile.TemporaryDirectory() as folder:
        run([*command, *flags, "--compile", "--seed=1", "--test-episodes=1"], Path(folder))
        (run_folder,) = run_folders(Path(folder))
        speeds = scalars(run_folder)["Time/step_per_second"][WARM_UP:]
    return median(speed for _, speed in speeds)


def main(repeats: int = 5) -> None:
    """Print a table in Markdown.

    Args:
        repeats: how often everything is run.
    """
    names = (*COMMANDS, STRANGERS)
    runs = [(repeat, name) for repeat in range(repeats) for name in names]
    rows = [
        {"repeat": repeat, "name": name, "steps_per_second": steps_per_second(name)}
        for repeat, name in tqdm(runs, unit="run")
    ]
    keep("processes", rows)
    speeds = {name: [row["steps_per_second"] for row in rows if row["name"] == name] for name in names}
    print("| LunarLander-v3 | steps/s | against one process |\n| --- | --- | --- |")
    for name, values in speeds.items():
        ratio = median(value / one for value, one in zip(values, speeds[ONE], strict=True))
        print(f"| {name} | {median(values):,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
