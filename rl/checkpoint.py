"""Checkpoints: what a run leaves behind to be tested, compared or continued."""

import os
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rl.agent import Agent
from rl.args import CommonArgs
from rl.envs import read_spaces


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
        ValueError: with one line, if there is none or it cannot be read.
    """
    path = run_or_checkpoint
    if path.is_dir() and not (path := max((path / "checkpoints").glob("update_*.ckpt"), default=None)):
        raise ValueError(f"the folder {run_or_checkpoint} holds no checkpoints/update_*.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"agent", "optimizer", "update", "global_step", "args"} - set(checkpoint)
    except FileNotFoundError:
        raise ValueError(f"there is no run and no checkpoint {path}") from None
    except (EOFError, RuntimeError, OSError, UnpicklingError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read: it is damaged, or no checkpoint of ours") from None
    if missing:
        raise ValueError(f"{path} is no checkpoint of ours: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def load_agent(run_or_checkpoint: Path) -> tuple[Agent, CommonArgs]:
    """Restore the agent, normalisation included, and the arguments of a run.

    Raises:
        ValueError: with one line, if there is no checkpoint, it cannot be read, or its environment cannot be made.
    """
    checkpoint = load_checkpoint(run_or_checkpoint)
    known = {field.name for field in fields(CommonArgs)}
    args = CommonArgs(**{name: value for name, value in checkpoint["args"].items() if name in known})
    agent = Agent(*read_spaces(args), args)
    agent.load_state_dict(checkpoint["agent"])
    return agent.eval(), args
