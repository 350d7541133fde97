"""Started by a launcher: trains as a script does, and keeps what each rank saw, drew and learnt.

Usage: train_and_keep.py OUTPUT SCRIPT FLAGS_OF_SCRIPT...
"""

import os
import runpy
import sys
from pathlib import Path

import torch

from rl.environments import collector
from rl.environments.collector import Collector


def main(output: Path, script: str) -> None:
    kept = {"observations": [], "actions": [], "noise": [], "weights": []}
    optimizers = []
    collect, draw_noise, make_adam = Collector.collect, collector.draw_action_noise, torch.optim.Adam.__init__

    def weights():
        return [parameter.detach().clone() for parameter in optimizers[0].param_groups[0]["params"]]

    def drawing_and_keeping(*args):
        kept["noise"].append(draw_noise(*args))
        return kept["noise"][-1].clone()

    def collecting_and_keeping(own, agent, update):
        kept["weights"].append(weights())
        rollout, episodes = collect(own, agent, update)
        kept["observations"].append(rollout.observations.clone())
        kept["actions"].append(rollout.actions.clone())
        return rollout, episodes

    def making_and_keeping(optimizer, *args, **kwargs):
        make_adam(optimizer, *args, **kwargs)
        optimizers.append(optimizer)

    Collector.collect, collector.draw_action_noise = collecting_and_keeping, drawing_and_keeping
    torch.optim.Adam.__init__ = making_and_keeping
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # a script ends with `sys.exit`
        kept["weights"].append(weights())
        states = optimizers[0].state.values()
        kept["optimizer"] = [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
        torch.save(kept, output / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    output, *sys.argv = sys.argv[1:]
    main(Path(output), sys.argv[0])
