"""Checkpoints: what a run leaves behind to be tested, compared or continued."""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rl.agent import Agent
from rl.args import CommonArgs
from rl.ending import at_end, can_resume, give_up
from rl.envs import read_spaces
from rl.launch import RunError, is_rank_zero, read_ranks, say
from rl.replay import ReplayableEnvs

KEYS = {"agent", "optimizer", "update", "global_step", "args", "world_size", "scalars", "environments"}


class Checkpoints:
    """Writes the checkpoints of a run: `checkpoints/update_<8 digits>.ckpt` in its folder.

    However the run ends (but by SIGKILL), the checkpoint of the last update is on the disk.

    Args:
        run_folder: folder of the run.
        args: of the run.
    """

    def __init__(self, run_folder: Path, args: CommonArgs) -> None:
        self.folder = run_folder / "checkpoints"
        self.args = args
        self.unwritten: tuple[Path, memoryview] | None = None
        self.writer, self.one_at_a_time = ThreadPoolExecutor(1), Lock()
        self.writing: Future[None] | None = None
        at_end(self.write)

    def add(
        self,
        update: int,
        agent: dict[str, Tensor],
        optimizer: Optimizer,
        scalars: dict[str, float],
        environments: list[Tensor],
        acting_weights: Tensor | None = None,
    ) -> None:
        """Keep the state after an update, and write it when it is time to.

        Args:
            update: number of updates done.
            agent: state dict of the plain network, normalisation included; it has the same keys in all scripts.
            optimizer: of its parameters.
            scalars: what was logged last.
            environments: the states of those of each process, see `environment_states`.
            acting_weights: those that act in the next rollout, where they are not the agent's, [P].

        Raises:
            RunError: if that of the last update cannot be written.
        """
        checkpoint = {
            "agent": agent,
            "optimizer": optimizer.state_dict(),
            "update": update,
            "global_step": update * self.args.num_steps,
            "args": asdict(self.args),
            "world_size": read_ranks().world_size,
            "scalars": scalars,
            "environments": environments,
            "acting_weights": acting_weights,
        }
        file = io.BytesIO()
        torch.save(checkpoint, file)
        if self.writing:
            self.writing.result()
        self.unwritten = (self.folder / f"update_{update:08d}.ckpt", file.getbuffer())
        can_resume(self.folder.parent)
        is_last = update == self.args.num_updates
        if is_last or update % self.args.checkpoint_every == 0:
            self.writing = self.writer.submit(self.write)  # the next rollout need not wait for the disk
        if is_last:
            self.writing.result()
            if self.unwritten:
                raise RunError(f"the last checkpoint cannot be written: make room in {self.folder}, then use --resume")

    def write(self) -> None:
        """Write what is not yet on the disk, if that takes it, and drop the oldest.

        The file appears under its name only once it is whole on the disk, so a crash leaves those before.
        """
        with self.one_at_a_time, give_up("a checkpoint"):
            self._write()

    def _write(self) -> None:
        if not self.unwritten:
            return
        path, content = self.unwritten
        temporary = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, is on the disk now
        os.close(folder)
        self.unwritten = None
        present = sorted(self.folder.glob("update_*.ckpt"))
        newer = [other for other in present if other > path]  # of a run that went on before this one was resumed
        for other in newer + [other for other in present if other <= path][: -self.args.keep_checkpoints]:
            other.unlink()


def environment_states(
    envs: ReplayableEnvs, observations: np.ndarray, agent: Agent, gather: Callable[[Tensor], Tensor] | None
) -> list[Tensor]:
    """Return the states of the environments of each process, as bytes, uint8; call it on all of them.

    Args:
        envs: of this process.
        observations: [N, *shape], where they are.
        agent: whose rewards may be normalised, with a sum for each environment.
        gather: returns the rows of all processes one after the other; None if there is one process.
    """
    sums = _discounted_sums(agent, envs)
    states = [
        state | {"discounted_sum": float(discounted_sum)}
        for state, discounted_sum in zip(envs.state(observations), sums, strict=True)
    ]
    packed = _pack(states)
    if gather is None:
        return [packed]
    # Episodes differ in length, so what is gathered is padded to the longest.
    device = next(agent.parameters()).device
    sizes = gather(torch.tensor([len(packed)], device=device)).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8, device=device)
    padded[0, : len(packed)] = packed
    return [row[:size].clone() for row, size in zip(gather(padded).cpu(), sizes, strict=True)]


def restore(
    checkpoint: dict[str, Any], agent: Agent, optimizer: Optimizer, envs: ReplayableEnvs, first_env: int
) -> np.ndarray:
    """Put agent, optimizer and environments back, and return the observations [N, *shape] to go on from.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        agent: of this process.
        optimizer: of its parameters.
        envs: of this process.
        first_env: index of the first of them among those of all processes.

    Raises:
        RunError: if the environments do not repeat their episodes.
    """
    agent.load_state_dict(checkpoint["agent"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    states = [state for packed in checkpoint["environments"] for state in _unpack(packed)]
    states = states[first_env : first_env + envs.num_envs]
    _discounted_sums(agent, envs)[:] = [state["discounted_sum"] for state in states]
    try:
        return envs.restore(states)
    except ValueError as error:
        raise RunError(f"the run cannot be resumed: {error}") from None


def _pack(states: list[dict[str, Any]]) -> Tensor:
    """Return states as bytes, uint8: a line of JSON, then the arrays; in a fraction of the time that pickling takes."""
    arrays: list[bytes] = []

    def describe(array: np.ndarray) -> dict[str, Any]:
        arrays.append(array.tobytes())
        return {"dtype": array.dtype.str, "shape": array.shape}

    line = json.dumps(states, default=describe).encode()
    return torch.frombuffer(bytearray(b"\n".join([line, b"".join(arrays)])), dtype=torch.uint8)


def _unpack(packed: Tensor) -> list[dict[str, Any]]:
    """Return what was packed."""
    line, _, arrays = packed.numpy().tobytes().partition(b"\n")
    file = io.BytesIO(arrays)

    def read(value: dict[str, Any]) -> Any:
        if value.keys() != {"dtype", "shape"}:
            return value
        array = np.empty(value["shape"], value["dtype"])
        file.readinto(array.data)
        return array

    return json.loads(line, object_hook=read)


def _discounted_sums(agent: Agent, envs: ReplayableEnvs) -> np.ndarray:
    """Return where the discounted sum of each environment's rewards stands, float64 [N], if rewards are normalised."""
    return getattr(agent.reward_normalizer, "sums", np.zeros(envs.num_envs))


def shared_checkpoint(args: CommonArgs, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if any: rank 0 reads it for all; call it on all ranks.

    Args:
        args: of the run.
        device: where the process group sends from.

    Raises:
        RunError: if there is none that can be read.
    """
    content = torch.empty(0, dtype=torch.uint8)
    if is_rank_zero() and args.resume:
        try:
            path = load_checkpoint(Path(args.resume))["path"]
        except ValueError as error:
            raise RunError(str(error)) from None
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    size = torch.tensor([len(content)], device=device)
    dist.broadcast(size, 0)
    if not size:
        return None
    content = content.to(device) if len(content) else content.new_empty(int(size), device=device)
    dist.broadcast(content, 0)
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def find_checkpoints(run_or_checkpoint: Path) -> list[Path]:
    """Return a checkpoint, or those of a run's folder, the last one first.

    Raises:
        ValueError: with one line, if there is none.
    """
    if not run_or_checkpoint.exists():
        raise ValueError(f"there is no run and no checkpoint {run_or_checkpoint}")
    if run_or_checkpoint.is_file():
        return [run_or_checkpoint]
    if found := sorted((run_or_checkpoint / "checkpoints").glob("update_*.ckpt"), reverse=True):
        return found
    raise ValueError(f"the folder {run_or_checkpoint} holds no checkpoints/update_*.ckpt")


def load_checkpoint(run_or_checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint, or the last good one of a run's folder, onto the CPU; nothing in it is executed.

    What is returned names its file, too, under "path".

    Raises:
        ValueError: with one line, if there is none that can be read.
    """
    *newer, oldest = find_checkpoints(run_or_checkpoint)
    for path in newer:
        try:
            return _read(path)
        except ValueError as error:
            say(f"{error}; going back to the one before")
    return _read(oldest)


def _read(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts about other pickles
            if zipfile.ZipFile(path).testzip():  # torch does not look at the check sums of what it reads
                raise ValueError
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = KEYS - set(checkpoint)
    except Exception:  # damaged bytes make the reader fail in many ways
        raise ValueError(f"{path} cannot be read: it is damaged, or no checkpoint of ours") from None
    if missing:
        raise ValueError(f"{path} is no checkpoint of ours: it lacks {', '.join(sorted(missing))}")
    return checkpoint | {"path": path}


def load_agent(run_or_checkpoint: Path) -> tuple[Agent, CommonArgs]:
    """Restore the agent, normalisation included, and the arguments of a run.

    Raises:
        ValueError: with one line, if there is no checkpoint, it cannot be read, or its environment cannot be made.
    """
    checkpoint = load_checkpoint(run_or_checkpoint)
    known = {field.name for field in fields(CommonArgs)}
    args = CommonArgs(**{name: value for name, value in checkpoint["args"].items() if name in known})
    agent = Agent(*read_spaces(args), args)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError:
        raise ValueError(f"{run_or_checkpoint} holds weights of another network than its arguments say") from None
    return agent.eval(), args
