"""Started by torchrun: every process takes its part in the channel and keeps what it sent and what it received.

After all of them, the player and the lead trainer do it again in a world of their own.

Usage: exchange_messages.py OUTPUT NUM_ROWS FREE_PORT
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from rl.processes.channel import LEAD_TRAINER, PLAYER, Channel
from rl.processes.peers import join
from rl.processes.ranks import leave, read_ranks
from rl.voice import RunError

ROUNDS = 2
ROW_BYTES = 5
TIMEOUT = 60


def exchange(channel: Channel, rank: int, num_rows: int, turn: int) -> dict:
    """The three messages of an update, the second in both ways."""
    torch.manual_seed(100 * turn + (PLAYER if rank == PLAYER else LEAD_TRAINER))  # the trainers hold the same weights
    agent = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if rank != PLAYER:  # numbers that arithmetic would not leave as they are
        agent[0].bias.data.copy_(torch.tensor([-0.0, 1e-45, torch.inf, torch.nan]))
        agent[1].bias.data.view(torch.int32).copy_(torch.tensor([0x7FC01234, 0x00000001 + turn]))
    kept = {"before": bits(agent)}
    if rank == PLAYER:
        kept["rows"] = torch.randint(256, (num_rows, ROW_BYTES), dtype=torch.uint8)
        channel.receive_weights(agent)
        channel.send_rows(kept["rows"], share_data=False)
        channel.send_rows(kept["rows"], share_data=True)
        kept["losses"] = channel.receive_losses(3)
    else:
        channel.send_weights(agent)
        kept["part"] = channel.receive_rows(num_rows, ROW_BYTES, share_data=False)
        kept["all"] = channel.receive_rows(num_rows, ROW_BYTES, share_data=True)
        kept["losses"] = torch.tensor([rank + turn, 2.0**-40 * rank, -1.0], dtype=torch.float64)
        channel.send_losses(kept["losses"].clone())
    channel.check_weights(agent, turn + 1)
    kept["after"] = bits(agent)
    return kept


def bits(agent: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().view(torch.int32) for parameter in agent.parameters()])


def exchange_state(channel: Channel, rank: int) -> list[torch.Tensor]:
    """What goes with a checkpoint: weights and Adam's state after two steps of the trainers, none of the player."""
    torch.manual_seed(rank)
    agent = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(agent.parameters())
    if rank == PLAYER:
        channel.receive_state(agent, optimizer)
    else:
        for _ in range(2):
            agent(torch.rand(4, 3)).square().sum().backward()
            optimizer.step()
        channel.send_state(agent, optimizer)
    parameters = [parameter.detach() for parameter in agent.parameters()]
    return parameters + [
        optimizer.state[p][name] for p in agent.parameters() for name in ("step", "exp_avg", "exp_avg_sq")
    ]


def refuses_different_weights(channel: Channel, rank: int) -> bool:
    """Whether the check ends the run where the last trainer's weights differ in one bit."""
    torch.manual_seed(0)
    agent = nn.Linear(3, 2)
    if rank == channel.num_trainers:
        agent.bias.data.view(torch.int32)[0] ^= 1
    try:
        channel.check_weights(agent, 7)
    except RunError as error:
        print(error, file=sys.stderr)
        return True
    return False


def use_channel(output: Path, num_rows: int) -> None:
    ranks = read_ranks()
    join(ranks, "gloo", TIMEOUT)
    channel = Channel(ranks.rank, ranks.world_size, "gloo", TIMEOUT)
    kept = {
        "rounds": [exchange(channel, ranks.rank, num_rows, turn) for turn in range(ROUNDS)],
        "state": exchange_state(channel, ranks.rank),
        "refuses": refuses_different_weights(channel, ranks.rank),
    }
    torch.save(kept, output / f"rank{ranks.rank}_of_{ranks.world_size}.pt")
    leave()


def main(output: str, num_rows: str, free_port: str) -> None:
    torch.set_num_threads(1)
    use_channel(Path(output), int(num_rows))
    if read_ranks().rank in (PLAYER, LEAD_TRAINER):
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": free_port}
        os.environ.update(world, TORCHELASTIC_USE_AGENT_STORE="False")  # the launcher's port is that of the old world
        use_channel(Path(output), int(num_rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
