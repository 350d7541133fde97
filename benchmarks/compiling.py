"""What the compiled gradient step and NumPy's policy save, and what it costs that they prove themselves.

    python -m benchmarks.compiling
    torchrun --standalone --nproc_per_node=2 -m benchmarks.compiling

Two networks of 64-64 on LunarLander's spaces; medians. Compiling is faster from a cache: TORCHINDUCTOR_CACHE_DIR names
its folder.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rl.args import CommonArgs
from rl.fast.gradient_step import GradientStep, ProvenStep, compile_gradient_step
from rl.fast.policy import make_policy
from rl.fast.shared_memory import use_shared_memory
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss
from rl.processes.placement import keep_to_own_cores
from rl.processes.ranks import read_ranks

REPEATS = 101
ROWS = (64, 128, 256)


def make_gradient_step(agent: Agent, optimizer: torch.optim.Optimizer, args: CommonArgs) -> GradientStep:
    """Return the gradient step of train_torch.py; over all processes, if the process group has several."""
    wrapped = DistributedDataParallel(agent) if dist.is_initialized() and dist.get_world_size() > 1 else agent

    def gradient_step(minibatch: Batch, rows: float) -> Tensor:
        losses = ppo_loss(wrapped, minibatch, rows, args)
        optimizer.zero_grad()
        losses.loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        return torch.stack(losses).detach()

    return gradient_step


def random_minibatch(agent: Agent, rows: int) -> Batch:
    """Return rows of random numbers."""
    zeros = Batch.zeros(rows, agent)
    batch = Batch(*(torch.randn_like(field) if field.is_floating_point() else field for field in zeros))
    return batch._replace(log_probs=agent(batch.observations, batch.actions)[0].detach())


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return how long a call takes, the median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    ranks = read_ranks()
    if ranks.world_size > 1:
        use_shared_memory()
        dist.init_process_group("shared")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_to_own_cores()
    rows_of_table = []
    for rows in ROWS:
        args = CommonArgs(compile=True, per_rank_batch_size=rows)
        agent = Agent(Box(-1, 1, (8,)), Discrete(4), args)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        shown, minibatch = make_gradient_step(agent, optimizer, args), random_minibatch(agent, rows)
        eager = seconds(lambda: shown(minibatch, rows))  # noqa: B023 (called at once)
        start = time.perf_counter()
        num_rows = rows * ranks.world_size
        step = compile_gradient_step(shown, agent, optimizer, args, num_rows)
        compiling = time.perf_counter() - start
        step(minibatch, rows)
        if not isinstance(step, ProvenStep) or not step.is_proven:
            raise RuntimeError("the compiled step is not proven")
        proof = seconds(lambda: step._prove(minibatch, rows))  # noqa: B023
        compiled = seconds(lambda: step.fast(minibatch, rows))  # noqa: B023
        observations = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
        policy = seconds(lambda: make_policy(agent, observations))  # noqa: B023
        rows_of_table.append((rows, compiling, 1e6 * eager, 1e6 * compiled, 1e3 * proof, 1e3 * policy))
    if ranks.rank == 0:
        print("| rows | compile, s | as shown, µs | compiled, µs | proof of the step, ms | proof of the policy, ms |")
        print("|" + " --- |" * 6)
        for rows, compiling, eager, compiled, proof, policy in rows_of_table:
            print(f"| {rows} | {compiling:.1f} | {eager:.0f} | {compiled:.0f} | {proof:.2f} | {policy:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
