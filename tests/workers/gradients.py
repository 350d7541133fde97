"""Started by torchrun: the gradients that DistributedDataParallel averages, of every minibatch of one epoch.

Usage: gradients.py OUTPUT CASE [CASE ...], each case a JSON list of what `gradients` takes.
"""

import json
import sys

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.loss import ppo_loss
from rl.ppo.minibatches import almost_equal_sizes, minibatches
from rl.run.ending import leave_process_group

OBSERVATIONS, ACTIONS = gym.spaces.Box(-1, 1, (8,)), gym.spaces.Discrete(4)


def make_agent(dtype: torch.dtype) -> Agent:
    torch.manual_seed(1)
    return Agent(OBSERVATIONS, ACTIONS, CommonArgs()).to(dtype)


def make_batch(num_rows: int, dtype: torch.dtype) -> Batch:
    rng = np.random.default_rng(2)
    normal = [torch.from_numpy(rng.normal(size=num_rows)).to(dtype) for _ in range(3)]
    observations = torch.from_numpy(rng.normal(size=(num_rows, 8))).to(dtype)
    log_probs = torch.from_numpy(np.log(rng.uniform(0.1, 0.5, size=num_rows))).to(dtype)
    return Batch(observations, torch.from_numpy(rng.integers(4, size=num_rows)), log_probs, *normal)


def gradients(dtype: str, num_rows: int, per_rank_batch_size: int, share_data: bool) -> torch.Tensor:
    """The gradient of each minibatch of one epoch, [minibatches, parameters]."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    args = CommonArgs(num_steps=num_rows, per_rank_batch_size=per_rank_batch_size, share_data=share_data, ent_coef=0.01)
    batch = make_batch(num_rows, getattr(torch, dtype))
    if not share_data:  # as the player deals it out: an almost equal part to each
        parts = [field.split(almost_equal_sizes(num_rows, world_size)) for field in batch]
        batch = Batch(*(part[rank] for part in parts))
    agent = DistributedDataParallel(make_agent(getattr(torch, dtype)))
    rows = []
    for minibatch, mean_rows in minibatches(batch, num_rows, args, 1, 0, rank, world_size):
        agent.zero_grad()
        ppo_loss(agent, minibatch, mean_rows, args).loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in agent.parameters()]))
    return torch.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case: gradients(*json.loads(case)) for case in sys.argv[2:]}
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    leave_process_group()
