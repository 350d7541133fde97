"""When a second process pays: a gradient step of one process against that of two, which average their gradients.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.second_process

Both take the same step: one process on all rows of a minibatch, or each of two on half of them. Interleaved repeats;
the medians of both in microseconds, and of their ratio, for networks of two hidden layers.
"""

import time
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from benchmarks.compiling import make_gradient_step, random_minibatch
from benchmarks.raw import keep
from rl.args import CommonArgs
from rl.fast.gradient_step import compile_gradient_step
from rl.fast.shared_memory import use_shared_memory
from rl.ppo.agent import Agent
from rl.processes.placement import keep_to_own_cores

REPEATS = 7
MOST_STEPS, LEAST_STEPS = 100, 4  # of a measurement; large steps need no mean of many
ROWS = (64, 256, 1024, 4096)
UNITS = (64, 256, 512)  # of each hidden layer


def make_step(units: int, rows: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Return a gradient step of one or of two processes on a minibatch of `rows` rows in all."""
    processes = dist.get_world_size(group)
    args = CommonArgs(compile=True, hidden_sizes=(units, units), per_rank_batch_size=rows // processes)
    agent = Agent(Box(-1, 1, (8,)), Discrete(4), args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    minibatch = random_minibatch(agent, rows // processes)
    shown = make_gradient_step(agent, optimizer, args)
    step = compile_gradient_step(shown, agent, optimizer, args, rows, group)
    return lambda: step.fast(minibatch, minibatch.num_rows)  # without the proofs, for which all processes meet


def microseconds(step: Callable[[], Tensor], steps: int) -> float:
    """Return how long a step takes, the mean over so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e6


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    use_shared_memory()
    dist.init_process_group("shared")
    keep_to_own_cores()
    is_first = dist.get_rank() == 0
    alone, both = dist.new_subgroups(1)[0], dist.group.WORLD
    if is_first:
        print("| rows of the minibatch | units of each layer | one process, µs | two, µs | one / two |")
        print("| --- | --- | --- | --- | --- |")
    raw = []
    for rows, units in product(ROWS, UNITS):
        torch.compiler.reset()
        one, two = make_step(units, rows, alone), make_step(units, rows, both)
        steps = max(LEAST_STEPS, min(MOST_STEPS, 2**23 // (rows * units)))
        pairs = []
        for _ in range(REPEATS):
            first = torch.tensor(microseconds(one, steps) if is_first else 0.0)  # the other one waits
            dist.broadcast(first, 0)
            dist.barrier()
            pairs.append((first.item(), microseconds(two, steps)))
        raw += [{"rows": rows, "units": units, "one_us": one_us, "two_us": two_us} for one_us, two_us in pairs]
        medians = (f"{median(times):,.0f}" for times in zip(*pairs, strict=True))
        if is_first:
            ratio = median(one_us / two_us for one_us, two_us in pairs)
            print(f"| {rows} | {units} |", " | ".join(medians), f"| {ratio:.2f} |", flush=True)
    if is_first:
        keep("second_process", raw)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
