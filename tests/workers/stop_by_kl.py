"""Started by torchrun: trains as train_torch.py does, where some ranks' data look as if the policy had moved far.

In update u the log-probabilities of what rank r collected are lowered by SHIFTS[u - 1][r]; with a learning rate that
moves nothing, all its ratios are exp(shift) in every epoch. Keeps of each rank how many optimizer steps each update
took, and what it collected.

Usage: stop_by_kl.py OUTPUT SHIFTS FLAGS_OF_TRAIN_TORCH..., the shifts as JSON.
"""

import json
import sys
from pathlib import Path

import torch

import train_torch
from rl.args import TorchArgs
from rl.processes.ranks import leave, read_ranks
from rl.run.command_line import parse


def main(output: Path, shifts: list[list[float]], flags: list[str]) -> None:
    rank = read_ranks().rank
    collect_rollout, adam = train_torch.collect_rollout, torch.optim.Adam
    kept = {"steps": [], "observations": [], "rewards": [], "dones": []}

    class CountingAdam(adam):
        def step(self, *args, **kwargs):
            kept["steps"][-1] += 1
            return super().step(*args, **kwargs)

    def shifting_collect_rollout(agent, *args):
        kept["steps"].append(0)
        rollout, observations, episodes = collect_rollout(agent, *args)
        kept["observations"].append(rollout.raw_observations.clone())
        kept["rewards"].append(rollout.rewards.clone())
        kept["dones"].append(rollout.dones.clone())
        state = agent.state_dict()
        kept["normalizers"] = {name: value.clone() for name, value in state.items() if "normalizer" in name}
        shift = shifts[len(kept["steps"]) - 1][rank]
        return rollout._replace(log_probs=rollout.log_probs - shift), observations, episodes

    torch.optim.Adam, train_torch.collect_rollout = CountingAdam, shifting_collect_rollout
    train_torch.main(parse(TorchArgs, flags))
    torch.save(kept, output / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
    leave()
