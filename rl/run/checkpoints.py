"""Checkpoints: what a run leaves behind to be tested, compared or continued."""

import io
import json
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rl.args import CommonArgs
from rl.environments.making import read_spaces
from rl.ppo.agent import Agent
from rl.ppo.normalize import RewardNormalizer
from rl.processes.peers import known_peers
from rl.processes.ranks import read_ranks
from rl.run.ending import can_resume, give_up, save_at_end
from rl.run.folder import is_whole
from rl.voice import RunError, is_rank_zero, say, say_first

Args = TypeVar("Args", bound=CommonArgs)

KINDS = {
    "agent": dict,
    "optimizer": dict,
    "update": int,
    "global_step": int,
    "args": dict,
    "world_size": int,
    "scalars": dict,
    "environments": list,
    "acting_weights": Tensor | None,
}
PATIENCE = 6  # seconds that the first process, on its way out, waits for what the others know of their environments


class Environments(Protocol):
    """N environments that know where they stood: `rl.environments.replay`, or as far as it can `rl.environments.envpool_envs`."""

    num_envs: int

    def states(self, update: int) -> list[dict[str, Any]]: ...  # noqa: D102
    def restore(self, states: list[dict[str, Any]]) -> tuple[np.ndarray, list[np.ndarray], list[str]]: ...  # noqa: D102


class Checkpoints:
    """Writes the checkpoints of a run: `checkpoints/update_<8 digits>.ckpt` in its folder.

    Every `--checkpoint-every` updates, and when the run is stopped or fails, that of the last update.

    Args:
        run_folder: folder of the run.
        args: of the run.
        envs: of this process.
        gather: returns the rows of all processes that run environments; None if there is one.
        done: updates done before, in a run that is resumed.
    """

    def __init__(
        self,
        run_folder: Path,
        args: CommonArgs,
        envs: Environments,
        gather: Callable[[Tensor], Tensor] | None,
        done: int = 0,
    ) -> None:
        self.folder = run_folder / "checkpoints"
        self.args, self.envs, self.gather = args, envs, gather
        self.ranks = read_ranks()
        self.update = self.written = done
        self.state: dict[str, Any] = {}  # after the last update, but for the environments
        self.writer, self.one_at_a_time = ThreadPoolExecutor(1), Lock()
        self.writing: Future[None] | None = None
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.identity = run_folder.stat().st_ino
        save_at_end(self.write_last)
        if any(self.folder.glob("update_*.ckpt")):
            can_resume(run_folder)

    def add(
        self,
        update: int,
        agent: dict[str, Tensor],
        optimizer: Optimizer,
        scalars: dict[str, float],
        acting_weights: Tensor | None = None,
    ) -> None:
        """Keep the state after an update, and write it when it is time to; call it on all processes.

        Args:
            update: number of updates done.
            agent: state dict of the plain network, normalisation included; it has the same keys in all scripts.
            optimizer: of its parameters.
            scalars: what was logged last.
            acting_weights: those that act in the next rollout, where they are not the agent's, [P].

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
            }
            self.state = _copy_to_cpu(state)  # the next update changes the tensors
        self.update = update
        if self.ranks.rank == 0 and not self._is_there():
            raise RunError(f"the run's folder {self.folder.parent} was deleted, and its log is lost")
        is_last = update == self.args.num_updates
        if not is_last and update % self.args.checkpoint_every != 0:
            return
        device = next(iter(agent.values())).device  # where the process group sends from
        environments = _gather_bytes(_pack(self.envs.states(update)).to(device), self.gather)
        if self.ranks.rank == 0:
            if self.writing:
                self.writing.result()
            self.writing = self.writer.submit(self._write, self.state, environments)  # the next rollout need not wait
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
        if self.update == self.written and self.ranks.rank == 0:
            return
        peers = known_peers() if self.gather else None
        if peers is None:
            environments = [_pack(self.envs.states(self.update))]
        elif self.ranks.rank == 0:
            own = _pack(self.envs.states(self.update))
            others = peers.collect(f"environments/{self.update}", PATIENCE)
            if others is None:
                return
            environments = [own, *(torch.frombuffer(bytearray(other), dtype=torch.uint8) for other in others)]
        else:
            for update in self.envs.marks:
                peers.leave(f"environments/{update}", _pack(self.envs.states(update)).numpy().tobytes())
            return
        self._write(self.state, environments)

    def _is_there(self) -> bool:
        """Return whether the run's folder is the one that the run began with; a checkpoint may have made it anew."""
        try:
            return self.folder.parent.stat().st_ino == self.identity
        except OSError:
            return False

    def _write(self, state: dict[str, Any], environments: list[Tensor]) -> None:
        """Write a checkpoint, if the disk takes it, and drop the oldest.

        The file appears under its name only once it is whole on the disk, so a crash leaves those before.
        """
        file = io.BytesIO()
        torch.save(state | {"environments": environments}, file)
        with self.one_at_a_time, give_up("a checkpoint"):
            self._put(self.folder / f"update_{state['update']:08d}.ckpt", file.getbuffer())
            self.written = max(self.written, state["update"])
            can_resume(self.folder.parent)
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


def restore(
    checkpoint: dict[str, Any], agent: Agent, optimizer: Optimizer, envs: Environments, first_env: int
) -> np.ndarray:
    """Put agent, optimizer and environments back, and return the observations [N, *shape] to go on from.

    Environments that cannot be put back begin new episodes, and a line says so.

    Args:
        checkpoint: as `shared_checkpoint` returns it.
        agent: of this process.
        optimizer: of its parameters.
        envs: of this process.
        first_env: index of the first of them among those of all processes.

    Raises:
        RunError: if the checkpoint does not fit the run.
    """
    restore_learner(checkpoint, agent, optimizer)
    try:
        states = [state for packed in checkpoint["environments"] for state in _unpack(packed)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"the run cannot be resumed: its checkpoint is damaged ({error})") from None
    states = states[first_env : first_env + envs.num_envs]
    if len(states) != envs.num_envs:
        raise RunError("the run cannot be resumed: its checkpoint holds fewer environments than the run has")
    observations, rewards, notes = envs.restore(states)
    if isinstance(agent.reward_normalizer, RewardNormalizer):
        agent.reward_normalizer.begin(rewards)
    if notes:
        say_first("episodes", f"{notes[0]}: from here on the run is not bit for bit the one that was stopped")
    return observations


def restore_learner(checkpoint: dict[str, Any], agent: Agent, optimizer: Optimizer) -> None:
    """Put agent and optimizer back.

    Raises:
        RunError: if the checkpoint does not fit them.
    """
    kinds = [{name: type(value) for name, value in group.items()} for group in optimizer.param_groups]
    try:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if kinds != [{name: type(value) for name, value in group.items()} for group in optimizer.param_groups]:
            raise ValueError("the optimizer has other settings")
        for parameter in agent.parameters():
            moments = [optimizer.state[parameter].get(name, parameter) for name in ("exp_avg", "exp_avg_sq")]
            if any(moment.shape != parameter.shape for moment in moments):
                raise ValueError("the optimizer's moments have other shapes than the weights")
    except Exception as error:  # torch does not check what it loads: damage shows in many ways
        reason = " ".join(str(error).split())
        raise RunError(f"the run cannot be resumed: its checkpoint does not fit ({reason})") from None


def _copy_to_cpu(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists whose tensors are on the CPU, each in memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    return [_copy_to_cpu(item) for item in value] if isinstance(value, list) else value


def _gather_bytes(packed: Tensor, gather: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """Return the bytes of all processes, uint8 [bytes] each; they differ in number, so they travel padded."""
    if gather is None:
        return [packed.cpu()]
    sizes = gather(torch.tensor([len(packed)], device=packed.device)).tolist()
    padded = packed.new_zeros(1, max(sizes))
    padded[0, : len(packed)] = packed
    return [row[:size].clone() for row, size in zip(gather(padded).cpu(), sizes, strict=True)]


def _pack(states: list[dict[str, Any]]) -> Tensor:
    """Return states as bytes, uint8: a line of JSON, then the arrays; in a fraction of the time that pickling takes."""
    arrays: list[bytes] = []

    def describe(array: np.ndarray) -> dict[str, Any]:
        arrays.append(array.tobytes())
        return {"dtype": array.dtype.str, "shape": array.shape}

    line = json.dumps(states, default=describe).encode()
    return torch.frombuffer(bytearray(b"\n".join([line, b"".join(arrays)])), dtype=torch.uint8)


def _unpack(packed: Tensor) -> list[dict[str, Any]]:
    """Return what was packed.

    Raises:
        ValueError: if it holds anything else than `_pack` writes.
    """
    line, _, arrays = packed.numpy().tobytes().partition(b"\n")
    file = io.BytesIO(arrays)

    def read(value: dict[str, Any]) -> Any:
        if value.keys() != {"dtype", "shape"}:
            return value
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of {dtype}")
        content = file.read(math.prod(value["shape"]) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(value["shape"])

    states = json.loads(line, object_hook=read)
    for state in states:
        if not all(type(state[key]) is int and 0 <= state[key] < 2**63 for key in ("seed", "episode")):
            raise ValueError("no seed of an episode")
        if state.keys() > {"seed", "episode"}:
            kinds = {"actions": np.ndarray, "observation": np.ndarray, "return": float, "numbers": dict}
            if not all(isinstance(state[key], kind) for key, kind in kinds.items()):
                raise ValueError("no state of an environment")
    return states


def shared_checkpoint(args: CommonArgs, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if any: rank 0 reads it for all; call it on all ranks.

    Args:
        args: of the run.
        device: where the process group sends from.

    Raises:
        RunError: if there is none that can be read.
    """
    content = torch.empty(0, dtype=torch.uint8)
    if is_rank_zero() and args.resume is not None:
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
            if not is_whole(path):
                raise ValueError
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = KINDS.keys() - set(checkpoint)
    except Exception:  # damaged bytes make the reader fail in many ways
        raise ValueError(f"{path} cannot be read: it is damaged, or no checkpoint of ours") from None
    if missing:
        raise ValueError(f"{path} is no checkpoint of ours: it lacks {', '.join(sorted(missing))}")
    wrong = [key for key, kind in KINDS.items() if not isinstance(checkpoint[key], kind)]
    if wrong or not all(isinstance(number, float | int) for number in checkpoint["scalars"].values()):
        raise ValueError(
            f"{path} is no checkpoint of ours: it holds something else as {', '.join(wrong or ['scalars'])}"
        )
    return checkpoint | {"path": path}


def run_args(checkpoint: dict[str, Any], script_args: type[Args]) -> Args:
    """Return the arguments of the run that wrote a checkpoint.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        script_args: the dataclass of the arguments; what it does not know is left out.

    Raises:
        ValueError: with one line, if they are none.
    """
    defaults = asdict(script_args())
    known = {name: value for name, value in checkpoint["args"].items() if name in defaults}
    for name, value in known.items():
        kinds = {float: float | int, type(None): str | float | int | None}.get(kind := type(defaults[name]), kind)
        if not isinstance(value, kinds):
            raise ValueError(f"{checkpoint['path']} is no checkpoint of ours: its {name} is {value!r}")
    try:
        return script_args(**known)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{checkpoint['path']} is no checkpoint of ours: {error}") from None


def load_agent(run_or_checkpoint: Path) -> tuple[Agent, CommonArgs]:
    """Restore the agent, normalisation included, and the arguments of a run.

    Raises:
        ValueError: with one line, if there is no checkpoint, it cannot be read, or its environment cannot be made.
    """
    checkpoint = load_checkpoint(run_or_checkpoint)
    args = run_args(checkpoint, CommonArgs)
    agent = Agent(*read_spaces(args), args)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, AttributeError, TypeError):
        raise ValueError(f"{run_or_checkpoint} holds weights of another network than its arguments say") from None
    return agent.eval(), args
