"""Checkpoints: what a run writes to be tested, compared or continued."""

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rl.args import CommonArgs
from rl.environments.packing import pack
from rl.processes.ranks import read_ranks
from rl.run.ending import ending
from rl.voice import RunError, going_on_without

PATIENCE = 6  # seconds that the first process, on its way out, waits for what the others know of their environments


class Environments(Protocol):
    """What knows where the environments of a process stood at the end of an update: `Collector`."""

    @property
    def updates(self) -> list[int]: ...  # noqa: D102 (those that it still remembers)

    def states(self, update: int) -> list[dict[str, Any]]: ...  # noqa: D102


class Checkpoints:
    """Writes the checkpoints of a run: `checkpoints/update_<8 digits>.ckpt` in its folder, and `best.ckpt` beside them.

    Every `--checkpoint-every` updates, and when the run is stopped or fails, that of the last update.

    Args:
        run_folder: folder of the run.
        args: of the run.
        gather: returns the bytes of all processes that run environments on the first; None if there is one.
        updates_done: before, in a run that is resumed.
    """

    def __init__(
        self,
        run_folder: Path,
        args: CommonArgs,
        gather: Callable[[Tensor], list[Tensor]] | None,
        updates_done: int = 0,
    ) -> None:
        self.folder = run_folder / "checkpoints"
        self.args, self.gather = args, gather
        self.ranks = read_ranks()
        self.update = self.written = updates_done
        self.environments: Environments | None = None
        self.state: dict[str, Any] = {}  # after the last update, but for the environments
        self.writer, self.one_at_a_time = ThreadPoolExecutor(1), Lock()
        self.writing: Future[None] | None = None
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.identity = run_folder.stat().st_ino
        ending.save = self.write_last
        if any(self.folder.glob("update_*.ckpt")):
            ending.run_folder = run_folder

    def add(
        self,
        update: int,
        agent: dict[str, Tensor],
        optimizer: Optimizer,
        scalars: dict[str, float],
        environments: Environments,
        acting_weights: Tensor | None = None,
        best_return: float | None = None,
        is_best: bool = False,
    ) -> None:
        """Keep the state after an update, and write it when it is time to; call it on all processes.

        Args:
            update: number of updates done.
            agent: state dict of the plain network, normalisation included; it has the same keys in all scripts.
            optimizer: of its parameters.
            scalars: what was logged last.
            environments: of this process.
            acting_weights: those that act in the next rollout, where they are not the agent's, [P].
            best_return: the highest mean return of an evaluation so far.
            is_best: whether this agent has it: then its checkpoint stays as `checkpoints/best.ckpt`, too.

        Raises:
            RunError: if that of the last update cannot be written, or the run's folder is gone.
        """
        if self.ranks.rank == 0:
            state = {
                "agent": agent,
                "optimizer": optimizer.state_dict(),
                "update": update,
                "global_step": update * self.args.steps_per_update(self.ranks.world_size),
                "args": asdict(self.args),
                "world_size": self.ranks.world_size,
                "scalars": dict(scalars),
                "acting_weights": acting_weights,
                "best_return": best_return,
            }
            self.state = _copy_to_cpu(state)  # the next update changes the tensors
        self.update, self.environments = update, environments
        if self.ranks.rank == 0 and not self._is_there():
            raise RunError(f"the run's folder {self.folder.parent} was deleted, and its log is lost")
        is_last = update == self.args.num_updates or self.args.is_solved_by(best_return)
        if not (is_last or is_best) and update % self.args.checkpoint_every != 0:
            return
        own = pack(environments.states(update))
        packed = self.gather(own) if self.gather else [own]
        if self.ranks.rank == 0:
            if self.writing:
                self.writing.result()
            with ending.signals_waiting():
                # The next rollout need not wait.
                self.writing = self.writer.submit(self._write, self.state, packed, is_best)
            if is_last:
                self.writing.result()
                if self.written != update:
                    raise RunError(
                        f"the last checkpoint cannot be written: make room in {self.folder}, then use --resume"
                    )

    def write_last(self) -> None:
        """Write the state after the last update on the way out; call it on all processes.

        The processes cannot gather any more, since any of them may be gone, so they leave what they know of their
        environments in the store. If one leaves nothing, the last checkpoint that was written stands.
        """
        if self.writing:
            self.writing.exception()  # waits for it
        if self.environments is None or (self.update == self.written and self.ranks.rank == 0):
            return
        own, peers = pack(self.environments.states(self.update)), ending.peers
        if self.gather is None or peers is None:
            self._write(self.state, [own])
        elif self.ranks.rank > 0:
            for update in self.environments.updates:
                states = pack(self.environments.states(update))
                peers.deposit(f"environments/{update}", states.numpy().tobytes())
        elif (others := peers.collect(f"environments/{self.update}", PATIENCE)) is not None:
            self._write(self.state, [own, *(torch.frombuffer(bytearray(o), dtype=torch.uint8) for o in others)])

    def _is_there(self) -> bool:
        """Return whether the run's folder is the one that the run began with; a checkpoint may have made it anew."""
        try:
            return self.folder.parent.stat().st_ino == self.identity
        except OSError:
            return False

    def _write(self, state: dict[str, Any], environments: list[Tensor], is_best: bool = False) -> None:
        """Write a checkpoint, if the disk takes it, and drop the oldest.

        The file appears under its name only once it is whole on the disk, so a crash leaves those before.
        """
        file = io.BytesIO()
        torch.save(state | {"environments": environments}, file)
        with self.one_at_a_time, going_on_without("a checkpoint"):
            self._put(self.folder / f"update_{state['update']:08d}.ckpt", file.getbuffer())
            if is_best:
                self._put(self.folder / "best.ckpt", file.getbuffer())
            self.written = max(self.written, state["update"])
            ending.run_folder = self.folder.parent
            for old in sorted(self.folder.glob("update_*.ckpt"))[: -self.args.keep_checkpoints]:
                old.unlink()

    def _put(self, path: Path, content: memoryview) -> None:
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


def _copy_to_cpu(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists whose tensors are on the CPU, each in memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    return [_copy_to_cpu(item) for item in value] if isinstance(value, list) else value
