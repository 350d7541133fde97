"""Started by a launcher: trains as a script does, where some processes' data look as if the policy had moved far.

In update u the log-probabilities of the batch of the r-th process that optimizes are lowered by SHIFTS[u - 1][r]; with
a learning rate that moves nothing, all its ratios are exp(shift) in every epoch. Keeps how many optimizer steps each
update took, and of a process that collects what it collected.

Usage: stop_by_kl.py OUTPUT SHIFTS SCRIPT FLAGS_OF_SCRIPT..., the shifts as JSON.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from rl.environments.collector import Collector
from rl.ppo.batch import Batch


def main(output: Path, shifts: list[list[float]], script: str) -> None:
    decoupled = "decoupled" in script
    place = int(os.environ["RANK"]) - decoupled
    kept = {"steps": [], "observations": [], "rewards": [], "dones": [], "normalizers": {}}
    makes_batch = "unpack" if decoupled else "from_rollout"  # of those that optimize
    make_batch, collect, step = getattr(Batch, makes_batch), Collector.collect, torch.optim.Adam.step

    def making_shifted_batch(*args):
        kept["steps"].append(0)
        batch = make_batch(*args)
        return batch._replace(log_probs=batch.log_probs - shifts[len(kept["steps"]) - 1][place])

    def collecting_and_keeping(collector, agent, update):
        rollout, episodes = collect(collector, agent, update)
        kept["observations"].append(rollout.raw_observations.clone())
        kept["rewards"].append(rollout.rewards.clone())
        kept["dones"].append(rollout.dones.clone())
        kept["normalizers"] = {name: value.clone() for name, value in agent.state_dict().items() if "norm" in name}
        return rollout, episodes

    def counting_step(*args, **kwargs):
        kept["steps"][-1] += 1
        return step(*args, **kwargs)

    setattr(Batch, makes_batch, making_shifted_batch)
    Collector.collect, torch.optim.Adam.step = collecting_and_keeping, counting_step
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # a script ends with `sys.exit`
        torch.save(kept, output / f"rank{place}.pt")


if __name__ == "__main__":
    output, shifts, *sys.argv = sys.argv[1:]
    main(Path(output), json.loads(shifts), sys.argv[0])
