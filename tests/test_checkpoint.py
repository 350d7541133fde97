"""A checkpoint costs nothing in the updates that write none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rl.args import TorchArgs
from rl.run.checkpoints import Checkpoints, load_checkpoint


class Environments:
    """Counts how often it is asked where it stood."""

    num_envs = 1
    marks = ()

    def __init__(self) -> None:
        self.asked: list[int] = []

    def states(self, update: int) -> list[dict]:
        self.asked.append(update)
        return [{"seed": 1, "episode": update}]


@pytest.fixture
def gathered() -> list[int]:
    return []


@pytest.fixture
def gather(gathered: list[int]) -> Callable[[Tensor], Tensor]:
    def gather(rows: Tensor) -> Tensor:
        gathered.append(len(rows))
        return rows

    return gather


def updates_on_disk(folder):
    return [int(path.stem.removeprefix("update_")) for path in sorted((folder / "checkpoints").iterdir())]


def train(checkpoints, updates):
    agent = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(agent.parameters())
    for update in updates:
        with torch.no_grad():
            agent.weight.fill_(update)
        checkpoints.add(update, agent.state_dict(), optimizer, {"Loss/loss": 0.5})
        with torch.no_grad():
            agent.weight.fill_(-1)  # the next update has begun
    return checkpoints


def test_states_are_asked_for_gathered_and_written_only_when_it_is_time_to(tmp_path, gathered, gather):
    envs, args = Environments(), TorchArgs(checkpoint_every=4, total_timesteps=10 * 1024)
    checkpoints = Checkpoints(tmp_path, args, envs, gather)
    train(checkpoints, range(1, 8))
    assert envs.asked == [4]
    assert len(gathered) == 2  # the sizes, and the states
    train(checkpoints, range(8, 11))
    assert envs.asked == [4, 8, 10]
    assert updates_on_disk(tmp_path) == [8, 10]


def test_on_the_way_out_the_state_after_the_last_update_is_written(tmp_path):
    envs, args = Environments(), TorchArgs(checkpoint_every=4, total_timesteps=10 * 1024)
    checkpoints = train(Checkpoints(tmp_path, args, envs, None), range(1, 8))
    checkpoints.write_last()
    assert updates_on_disk(tmp_path) == [4, 7]
    written = load_checkpoint(tmp_path)
    assert (written["update"], written["agent"]["weight"].tolist()) == (7, [[7.0, 7.0]])
    checkpoints.write_last()  # again, which is no work
    assert envs.asked == [4, 7]


def test_only_the_newest_checkpoints_are_kept_and_none_that_is_later_is_touched(tmp_path):
    args = TorchArgs(keep_checkpoints=3, total_timesteps=20 * 1024)
    train(Checkpoints(tmp_path, args, Environments(), None), range(1, 8)).write_last()
    assert updates_on_disk(tmp_path) == [5, 6, 7]


def test_a_checkpoint_holds_tensors_of_the_cpu_each_of_its_own_size(tmp_path):
    weights = torch.arange(100.0)
    agent = nn.Linear(2, 1, bias=False)
    agent.weight.data = weights[10:12].view(1, 2)  # as compilation leaves them: views of one tensor
    args = TorchArgs(total_timesteps=1024)
    Checkpoints(tmp_path, args, Environments(), None).add(
        1, agent.state_dict(), torch.optim.Adam(agent.parameters()), {}
    )
    written = load_checkpoint(tmp_path)["agent"]["weight"]
    assert (written.tolist(), written.device.type, written.untyped_storage().nbytes()) == ([[10.0, 11.0]], "cpu", 8)
