"""Started by torchrun: every process takes its part in the channel and keeps what it sent and what it received.

Usage: exchange_messages.py OUTPUT NUM_ROWS
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from rl.args import DecoupledArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.processes.channel import PLAYER, Channel
from rl.run.ending import leave_process_group
from rl.voice import RunError

ROUNDS = 2
NUM_ENVS = 2


def random_batch(num_rows: int, agent: Agent) -> Batch:
    return Batch(*(torch.rand(field.shape).to(field.dtype) for field in Batch.zeros(num_rows, agent)))


def exchange(channel: Channel, update: int) -> dict:
    """The three messages of an update, of a player and trainers that know nothing of each other's numbers."""
    torch.manual_seed(100 * update + min(channel.rank, 1))  # the trainers hold the same weights
    agent = Agent(Box(-1, 1, (5,)), Discrete(3), channel.args)
    optimizer = torch.optim.Adam(agent.parameters())
    kept = {"before": bits(agent)}
    if channel.rank == PLAYER:
        batch = random_batch(channel.args.steps_per_update(channel.world_size), agent)
        kept["rows"] = batch.pack()
        channel.send_batch(batch, update)
        kept["losses"] = channel.receive_losses()
        channel.receive_state(agent, optimizer)
    else:
        kept["rows"] = channel.receive_batch(Batch.zeros(0, agent)).pack()
        for _ in range(update):
            sum(agent(torch.rand(4, 5), torch.zeros(4, dtype=torch.int64))).sum().backward()
            optimizer.step()
        # Numbers that arithmetic would not leave as they are.
        agent.actor[0].bias.data[:4] = torch.tensor([-0.0, 1e-45, torch.inf, torch.nan])
        agent.actor[2].bias.data[:2].view(torch.int32).copy_(torch.tensor([0x7FC01234, update]))
        kept["losses"] = torch.tensor([channel.rank + update, 2.0**-40 * channel.rank, *range(6)], dtype=torch.float64)
        channel.send_losses(kept["losses"].clone())
        channel.send_state(agent, optimizer)
    channel.check_weights(agent, update)
    kept["after"] = bits(agent)
    states = [optimizer.state[parameter] for parameter in agent.parameters() if parameter in optimizer.state]
    kept["state"] = [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
    return kept


def bits(agent: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().view(torch.int32) for parameter in agent.parameters()])


def refuses_different_weights(channel: Channel) -> bool:
    """Whether the check ends the run where the last trainer's weights differ in one bit."""
    torch.manual_seed(0)
    agent = nn.Linear(3, 2)
    if channel.rank == channel.num_trainers:
        agent.bias.data.view(torch.int32)[0] ^= 1
    try:
        channel.check_weights(agent, 7)
    except RunError as error:
        print(error, file=sys.stderr)
        return True
    return False


def main(output: Path, num_rows: int) -> None:
    torch.set_num_threads(1)
    args = DecoupledArgs(num_envs=NUM_ENVS, num_steps=num_rows, timeout=60)
    kept = {}
    for way, share_data in (("own parts", False), ("shared", True)):
        channel = Channel(replace(args, share_data=share_data), "gloo")
        kept[way] = [exchange(channel, update) for update in range(1, ROUNDS + 1)]
    kept["refuses"] = refuses_different_weights(channel)
    torch.save(kept, output / f"rank{channel.rank}_of_{channel.world_size}.pt")
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
