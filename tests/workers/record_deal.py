"""Started by a launcher: trains as train_fabric_decoupled.py does, and keeps the rows that are dealt to the trainers.

Writes of each update what the player sends, packed, in the order of the rollout, to `rank0_<update>.pt`, and what each
trainer unpacked to `rank<rank>_<update>.pt`.

Usage: record_deal.py OUTPUT SCRIPT FLAGS_OF_SCRIPT...
"""

import os
import runpy
import sys
from itertools import count
from pathlib import Path

import torch

from rl.ppo.batch import Batch
from rl.processes.channel import Channel


def main(output: Path, script: str) -> None:
    send_batch, unpack = Channel.send_batch, Batch.unpack
    updates = count(1)

    def keep(rows):
        torch.save(rows.clone(), output / f"rank{os.environ['RANK']}_{next(updates)}.pt")
        return rows

    def send_and_keep(channel, batch, update):
        keep(batch.pack())
        send_batch(channel, batch, update)

    Channel.send_batch = send_and_keep
    Batch.unpack = lambda batch, rows: unpack(batch, keep(rows))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    output, *sys.argv = sys.argv[1:]
    main(Path(output), sys.argv[0])
