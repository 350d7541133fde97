"""What a gradient step costs: as the script shows it, as `torch.compile` makes it, in C++, and in JAX.

    python -m benchmarks.gradient_step
    python -m benchmarks.gradient_step --rival-python /path/to/venv/bin/python      # a Python that has JAX

Two networks of 64-64 on LunarLander's spaces, on one core. The ways take turns; printed is the median over the rounds
of microseconds of processor time, which other processes disturb less than time on the clock, and of the ratios within
a round. JAX takes the 16 steps of an epoch in one call.
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from benchmarks.compiling import make_gradient_step
from benchmarks.raw import keep
from rl.args import CommonArgs
from rl.fast.flat import FastStep, FlatAdam
from rl.fast.native import make_native_step
from rl.fast.traced import make_traced_step
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch

SPACES = Box(-1, 1, (8,)), Discrete(4)
ARGS = CommonArgs()
XLA = Path(__file__).parent / "rivals" / "xla_step.py"


def parse_args() -> Namespace:
    """Parse the command line."""
    formatter = ArgumentDefaultsHelpFormatter
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256], help="rows of a minibatch")
    parser.add_argument("--rounds", type=int, default=5, help="how often the ways take turns")
    parser.add_argument("--repeats", type=int, default=200, help="steps in a round")
    parser.add_argument("--rival-python", type=Path, help="a Python that has JAX, to measure it too")
    return parser.parse_args()


def make_agent() -> tuple[Agent, torch.optim.Optimizer]:
    """Return an agent and its optimizer, always the same."""
    torch.manual_seed(0)
    agent = Agent(*SPACES, ARGS)
    return agent, torch.optim.Adam(agent.parameters(), lr=ARGS.learning_rate, eps=1e-5, fused=True)


def make_minibatch(rows: int) -> Batch:
    """Return rows of random numbers, always the same."""
    agent, _ = make_agent()
    zeros = Batch.zeros(rows, agent)
    batch = Batch(*(torch.randn_like(field) if field.is_floating_point() else field for field in zeros))
    return batch._replace(log_probs=agent(batch.observations, batch.actions)[0].detach())


def make_shown() -> Callable[[Batch, float], torch.Tensor]:
    """Return the step of the script."""
    return make_gradient_step(*make_agent(), ARGS)


def make_traced(sizes: list[int]) -> FastStep:
    """Return the step that `torch.compile` makes."""
    agent, optimizer = make_agent()
    return make_traced_step(agent, ARGS, FlatAdam.of(agent, optimizer), sizes, None)


def make_native() -> FastStep:
    """Return the step in C++.

    Raises:
        RuntimeError: if there is none here; a line has said why.
    """
    agent, optimizer = make_agent()
    step = make_native_step(agent, ARGS, FlatAdam.of(agent, optimizer), None)
    if step is None:
        raise RuntimeError("there is no step in C++ on this machine")
    return step


def microseconds(step: Callable[[Batch, float], object], minibatch: Batch, repeats: int) -> float:
    """Return the processor time of a step, the median."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        step(minibatch, minibatch.num_rows)
        times.append(time.thread_time() - start)
    return 1e6 * median(times)


def measure_xla(python: Path, inputs: Path, rows: list[int]) -> dict[int, tuple[float, list[float]]]:
    """Return for each number of rows the microseconds of a step in JAX, and the losses of the first."""
    command = [str(python.absolute()), str(XLA), str(inputs), *map(str, rows)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {line["rows"]: (line["us"], line["losses"]) for line in map(json.loads, lines)}


def write_inputs(path: Path, minibatches: dict[int, Batch]) -> None:
    """Write weights and minibatches for JAX."""
    arrays = {name: tensor.numpy() for name, tensor in make_agent()[0].state_dict().items()}
    for rows, minibatch in minibatches.items():
        arrays |= {f"{rows}.{i}": field.numpy() for i, field in enumerate(minibatch)}
    np.savez(path, allow_pickle=False, **arrays)


def main() -> None:
    """Print a table in Markdown."""
    args = parse_args()
    torch.set_num_threads(1)
    minibatches = {rows: make_minibatch(rows) for rows in args.rows}
    start = time.perf_counter()
    native = make_native()
    print(f"C++ is there after {time.perf_counter() - start:.2f} s", file=sys.stderr)
    start = time.perf_counter()
    traced = make_traced(args.rows)
    print(f"torch.compile is there after {time.perf_counter() - start:.2f} s", file=sys.stderr)
    ways = {"as shown": make_shown(), "torch.compile": traced, "C++": native}
    rounds: list[dict[tuple[str, int], float]] = []
    with TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs.npz")
        write_inputs(inputs, minibatches)
        for _ in range(args.rounds):
            times = {
                (name, rows): microseconds(step, minibatch, args.repeats)
                for rows, minibatch in minibatches.items()
                for name, step in ways.items()
            }
            if args.rival_python:
                for rows, (us, losses) in measure_xla(args.rival_python, inputs, args.rows).items():
                    times["JAX", rows] = us
                    ours = make_shown()(minibatches[rows], rows).tolist()
                    if not np.allclose(losses, ours, rtol=1e-4, atol=1e-5):
                        raise RuntimeError(f"JAX computes other losses: {losses}, not {ours}")
            rounds.append(times)
    keep(
        "gradient_step",
        [
            {"round": number, "name": name, "rows": rows, "us": us}
            for number, times in enumerate(rounds)
            for (name, rows), us in times.items()
        ],
    )
    names = list(dict.fromkeys(name for name, _ in rounds[0]))
    print("| rows |", *(f"{name}, µs |" for name in names), *(f"C++ / {name} |" for name in names if name != "C++"))
    print("|" + " --- |" * (2 * len(names)))
    for rows in args.rows:
        costs = [f"{median(times[name, rows] for times in rounds):.0f} |" for name in names]
        ratios = [
            f"{median(times['C++', rows] / times[name, rows] for times in rounds):.2f} |"
            for name in names
            if name != "C++"
        ]
        print(f"| {rows} |", *costs, *ratios)


if __name__ == "__main__":
    main()
