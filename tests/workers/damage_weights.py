"""Started by a launcher: trains as a script does, where the weights of one rank change in one bit.

They do so after the optimizer's step STEP of that rank. A rank 0 of the decoupled script takes no steps: there they do
so whenever weights have arrived.

Usage: damage_weights.py RANK STEP SCRIPT FLAGS_OF_SCRIPT...
"""

import os
import runpy
import sys

import torch
from torch import Tensor, nn

from rl.processes.channel import Channel


def damage(weight: Tensor) -> None:
    weight.data.view(torch.int32)[0] ^= 1


def damage_after_step(number: int) -> None:
    step = torch.optim.Adam.step
    steps = 0

    def damaging_step(optimizer, *args, **kwargs):
        nonlocal steps
        steps += 1
        step(optimizer, *args, **kwargs)
        if steps == number:
            damage(optimizer.param_groups[0]["params"][-1])

    torch.optim.Adam.step = damaging_step


def damage_what_arrives() -> None:
    def damaging(receive):
        def receive_and_damage(channel, *args):
            received = receive(channel, *args)
            for arg in args:
                if isinstance(arg, nn.Module):
                    damage([*arg.parameters()][-1])
            return received

        return receive_and_damage

    for name in [name for name in vars(Channel) if name.startswith("receive_")]:
        setattr(Channel, name, damaging(getattr(Channel, name)))


if __name__ == "__main__":
    rank, step, *sys.argv = sys.argv[1:]
    if rank == os.environ["RANK"]:
        damage_after_step(int(step))
        damage_what_arrives()
    runpy.run_path(sys.argv[0], run_name="__main__")
