"""Checkpoints: what a run leaves behind to be tested, compared or continued."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rl.args import CommonArgs


def save_checkpoint(run_folder: Path, agent: nn.Module, optimizer: Optimizer, update: int, args: CommonArgs) -> Path:
    """Write `checkpoints/update_<8 digits>.ckpt` into the run's folder and return its path.

    The file appears under its name only once it is whole on the disk, so a crash leaves no broken checkpoint.

    Args:
        run_folder: folder of the run.
        agent: the plain network; its state dict has the same keys in all scripts.
        optimizer: of its parameters.
        update: number of updates done.
        args: of the run.
    """
    path = run_folder / "checkpoints" / f"update_{update:08d}.ckpt"
    checkpoint = {
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "update": update,
        "global_step": update * args.num_steps,
        "args": asdict(args),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, is on the disk now
    os.close(folder)
    return path


def load_checkpoint(run_or_checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint, or the last one of a run's folder, onto the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = run_or_checkpoint
    if path.is_dir():
        path = max((path / "checkpoints").glob("update_*.ckpt"), default=path / "checkpoints" / "update_*.ckpt")
    return torch.load(path, map_location="cpu", weights_only=True)
