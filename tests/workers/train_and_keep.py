"""Started by torchrun: trains as train_torch.py does, and keeps what each rank saw, drew and learnt.

Usage: train_and_keep.py OUTPUT FLAGS_OF_TRAIN_TORCH...
"""

import sys
from pathlib import Path

import torch

import train_torch
from rl.args import TorchArgs
from rl.processes.ranks import leave, read_ranks
from rl.run.command_line import parse


def main(output: Path, flags: list[str]) -> None:
    kept = {"observations": [], "actions": [], "noise": [], "weights": []}
    optimizers = []
    collect_rollout, adam = train_torch.collect_rollout, torch.optim.Adam

    def weights():
        return [parameter.detach().clone() for parameter in optimizers[0].param_groups[0]["params"]]

    def keeping_collect_rollout(agent, envs, observations, noise):
        rollout, observations, episodes = collect_rollout(agent, envs, observations, noise)
        kept["observations"].append(rollout.observations.clone())
        kept["actions"].append(rollout.actions.clone())
        kept["noise"].append(noise.clone())
        kept["weights"].append(weights())
        return rollout, observations, episodes

    def keeping_adam(*args, **kwargs):
        optimizers.append(adam(*args, **kwargs))
        return optimizers[-1]

    train_torch.collect_rollout = keeping_collect_rollout
    torch.optim.Adam = keeping_adam
    train_torch.main(parse(TorchArgs, flags))
    kept["weights"].append(weights())
    kept["optimizer"] = [
        state[name] for state in optimizers[0].state.values() for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    torch.save(kept, output / f"rank{read_ranks().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
