"""A checkpoint costs nothing in the updates that write none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rl.args import TorchArgs
from rl.environments.packing import unpack
from rl.run import checkpoints
from rl.run.checkpoints import Checkpoints
from rl.run.ending import Ending
from rl.run.resuming import load_checkpoint
from rl.voice import RunError


class Environments:
    """Counts how often it is asked where it stood."""

    updates = ()

    def __init__(self) -> None:
        self.asked: list[int] = []

    def states(self, update: int) -> list[dict]:
        self.asked.append(update)
        return [{"seed": 1, "episode": update}]


@pytest.fixture(autouse=True)
def ending(monkeypatch):
    """How a run ends is not told to the other tests."""
    monkeypatch.setattr(checkpoints, "ending", ending := Ending())
    return ending


@pytest.fixture
def gathered() -> list[int]:
    return []


@pytest.fixture
def gather(gathered: list[int]) -> Callable[[Tensor], list[Tensor]]:
    def gather(packed: Tensor) -> list[Tensor]:
        gathered.append(len(packed))
        return [packed]

    return gather


def updates_on_disk(folder):
    return [int(path.stem.removeprefix("update_")) for path in sorted((folder / "checkpoints").iterdir())]


def train(checkpoints, updates, environments=None):
    agent = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(agent.parameters())
    for update in updates:
        with torch.no_grad():
            agent.weight.fill_(update)
        checkpoints.add(update, agent.state_dict(), optimizer, {"Loss/loss": 0.5}, environments or Environments())
        with torch.no_grad():
            agent.weight.fill_(-1)  # the next update has begun
    return checkpoints


def test_states_are_asked_for_gathered_and_written_only_when_it_is_time_to(tmp_path, gathered, gather):
    envs, args = Environments(), TorchArgs(checkpoint_every=4, total_timesteps=10 * 1024)
    checkpoints = train(Checkpoints(tmp_path, args, gather), range(1, 8), envs)
    assert envs.asked == [4]
    assert len(gathered) == 1
    train(checkpoints, range(8, 11), envs)
    assert envs.asked == [4, 8, 10]
    assert updates_on_disk(tmp_path) == [8, 10]


def test_on_the_way_out_the_state_after_the_last_update_is_written(tmp_path):
    envs, args = Environments(), TorchArgs(checkpoint_every=4, total_timesteps=10 * 1024)
    checkpoints = train(Checkpoints(tmp_path, args, None), range(1, 8), envs)
    checkpoints.write_last()
    assert updates_on_disk(tmp_path) == [4, 7]
    written = load_checkpoint(tmp_path)
    assert (written["update"], written["agent"]["weight"].tolist()) == (7, [[7.0, 7.0]])
    checkpoints.write_last()  # again, which is no work
    assert envs.asked == [4, 7]


def test_only_the_newest_checkpoints_are_kept_and_none_that_is_later_is_touched(tmp_path):
    args = TorchArgs(keep_checkpoints=3, total_timesteps=20 * 1024)
    train(Checkpoints(tmp_path, args, None), range(1, 8)).write_last()
    assert updates_on_disk(tmp_path) == [5, 6, 7]


def test_a_checkpoint_holds_tensors_of_the_cpu_each_of_its_own_size(tmp_path):
    weights = torch.arange(100.0)
    agent = nn.Linear(2, 1, bias=False)
    agent.weight.data = weights[10:12].view(1, 2)  # as compilation leaves them: views of one tensor
    args = TorchArgs(total_timesteps=1024)
    optimizer = torch.optim.Adam(agent.parameters())
    Checkpoints(tmp_path, args, None).add(1, agent.state_dict(), optimizer, {}, Environments())
    written = load_checkpoint(tmp_path)["agent"]["weight"]
    assert (written.tolist(), written.device.type, written.untyped_storage().nbytes()) == ([[10.0, 11.0]], "cpu", 8)


def test_where_to_go_on_is_known_as_soon_as_a_checkpoint_is_there(tmp_path, ending):
    args = TorchArgs(checkpoint_every=2, total_timesteps=10 * 1024)
    checkpoints = train(Checkpoints(tmp_path, args, None), [1])
    assert (ending.run_folder, ending.save) == (None, checkpoints.write_last)
    train(checkpoints, [2]).writing.result()
    assert ending.run_folder == tmp_path
    ending.run_folder = None
    Checkpoints(tmp_path, args, None, updates_done=2)
    assert ending.run_folder == tmp_path


def test_a_run_whose_folder_is_gone_or_another_ends_with_a_line(tmp_path):
    args = TorchArgs(checkpoint_every=100, total_timesteps=200 * 1024)
    for number, make_anew in enumerate((False, True)):
        folder = tmp_path / str(number)
        checkpoints = train(Checkpoints(folder, args, None), [1])
        folder.rename(tmp_path / f"moved {number}")
        if make_anew:
            folder.mkdir()
        with pytest.raises(RunError, match=f"^the run's folder {folder} was deleted, and its log is lost$"):
            train(checkpoints, [2])


def test_bytes_of_processes_that_differ_in_number_arrive_as_they_were(tmp_path):
    others = torch.tensor([7, 8, 9], dtype=torch.uint8)

    train(Checkpoints(tmp_path, TorchArgs(total_timesteps=1024), lambda packed: [packed, others]), [1])
    own, theirs = load_checkpoint(tmp_path)["environments"]
    assert unpack(own) == [{"seed": 1, "episode": 1}]
    assert torch.equal(theirs, others)
