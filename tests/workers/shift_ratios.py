"""Started by a launcher: trains as a script does, where some processes' data look as if the policy had moved far.

In update u the log-probabilities of the batch of the r-th process that optimizes are lowered by SHIFTS[u - 1][r]; with
a learning rate that moves nothing, all its ratios are exp(shift) in every epoch. Writes how many optimizer steps each
update took to `steps<r>.json`.

Usage: shift_ratios.py OUTPUT SHIFTS SCRIPT FLAGS_OF_SCRIPT..., the shifts as JSON.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from rl.ppo.batch import Batch


def main(output: Path, shifts: list[list[float]], script: str) -> None:
    decoupled = "decoupled" in script
    place = int(os.environ["RANK"]) - decoupled
    makes_batch = "unpack" if decoupled else "from_rollout"  # of those that optimize
    make_batch, step = getattr(Batch, makes_batch), torch.optim.Adam.step
    steps: list[int] = []

    def make_shifted_batch(*args):
        steps.append(0)
        batch = make_batch(*args)
        return batch._replace(log_probs=batch.log_probs - shifts[len(steps) - 1][place])

    def counting_step(*args, **kwargs):
        steps[-1] += 1
        (output / f"steps{place}.json").write_text(json.dumps(steps))
        return step(*args, **kwargs)

    setattr(Batch, makes_batch, make_shifted_batch)
    torch.optim.Adam.step = counting_step
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    output, shifts, *sys.argv = sys.argv[1:]
    main(Path(output), json.loads(shifts), sys.argv[0])
