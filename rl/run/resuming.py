"""Going on: a run's checkpoint is read, checked, and put back into agent, optimizer and environments."""

import io
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rl.args import CommonArgs
from rl.environments.collector import Collector
from rl.environments.making import read_spaces
from rl.environments.packing import unpack
from rl.ppo.agent import Agent
from rl.processes.gather import message_device
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
    "best_return": float | None,
}


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
        kind = type(defaults[name])
        kinds = {float: (float, int), type(None): (str, float, int, type(None))}.get(kind, (kind,))
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


def shared_checkpoint(args: CommonArgs) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if any: rank 0 reads it for all; call it on all ranks.

    Args:
        args: of the run.

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
    if dist.is_initialized():
        device = message_device()
        size = torch.tensor([len(content)], device=device)
        dist.broadcast(size, 0)
        if not size:
            return None
        content = content.to(device) if len(content) else content.new_empty(int(size), device=device)
        dist.broadcast(content, 0)
    if not len(content):
        return None
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def restore_environments(checkpoint: dict[str, Any], collector: Collector) -> None:
    """Put the environments of this process back. Those that cannot be begin new episodes, and a line says so.

    Raises:
        RunError: if the checkpoint does not fit the run.
    """
    try:
        states = [state for packed in checkpoint["environments"] for state in unpack(packed)]
    except ValueError as error:
        raise RunError(f"the run cannot be resumed: its checkpoint is damaged ({error})") from None
    if len(states) <= collector.env_indices[-1]:
        raise RunError("the run cannot be resumed: its checkpoint holds fewer environments than the run has")
    if notes := collector.restore(states):
        say_first("episodes", f"{notes[0]}: from here on the run is not bit for bit the one that was stopped")


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
