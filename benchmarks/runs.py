"""What a run left behind: its folder, its last checkpoint and its log. For `benchmarks/faults.py` and the tests."""

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs that were started in a folder, the last one last."""
    return sorted(folder.glob("logs/*/*"))


def checkpoint_path(run_folder: Path, update: int) -> Path:
    """Return where a run keeps the checkpoint of an update."""
    return run_folder / "checkpoints" / f"update_{update:08d}.ckpt"


def last_checkpoint(run_folder: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    return torch.load(max((run_folder / "checkpoints").glob("update_*.ckpt")), weights_only=True)


def tensors(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of the agent and of its optimizer, each by a name."""
    states = checkpoint["optimizer"]["state"].items()
    agent = {f"agent {name}": value for name, value in checkpoint["agent"].items()}
    return agent | {f"optimizer {index} {name}": value for index, state in states for name, value in state.items()}


def differences(checkpoint: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two checkpoints, bit for bit: agent, optimizer and its settings."""
    one, two = tensors(checkpoint), tensors(other)
    different = sorted(one.keys() ^ two.keys()) + [
        name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])
    ]
    if checkpoint["optimizer"]["param_groups"] != other["optimizer"]["param_groups"]:
        different.append("optimizer settings")
    return different


def scalars(run_folder: Path, times: bool = True) -> dict[str, list[tuple[int, float]]]:
    """Return every scalar that TensorBoard shows of a run: its points (step, value), in the order of the file.

    Args:
        run_folder: where the log lies.
        times: whether those are wanted that no two runs have in common.
    """
    events = read_events(run_folder)
    tags = [tag for tag in sorted(events.Tags()["scalars"]) if times or not tag.startswith("Time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def read_events(run_folder: Path) -> EventAccumulator:
    """Return all that TensorBoard shows of a run."""
    return EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def hyperparameters(run_folder: Path) -> dict[str, str]:
    """Return the table of the flags that TensorBoard shows of a run."""
    (event,) = read_events(run_folder).Tensors("hyperparameters/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    _, _, *rows = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines())
    return dict(rows)
