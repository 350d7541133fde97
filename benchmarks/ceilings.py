"""What no program can be faster than: the parts of an update alone, each in a tight loop.

    python -m benchmarks.ceilings --env-id LunarLander-v3 --minibatch-size 64

Prints a line of JSON: microseconds of a step of all environments (Gymnasium's or ours, whichever is faster), of a
policy step for them (actions, and with them log-probabilities and values, which cost least for a whole rollout at
once), and of a compiled gradient step. Started by `torchrun` it measures all processes at once, and also an all-reduce
of as many numbers as there are weights.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from benchmarks.rivals import NUM_ENVS, ROLLOUT_LENGTH
from rl.agent import Agent
from rl.args import TorchArgs
from rl.compiled import compile_gradient_step
from rl.distributions import draw_action_noise
from rl.envs import make_envs, read_spaces
from rl.launch import read_ranks
from rl.minibatch import Batch
from rl.placement import keep_to_own_cores
from rl.policy import make_policy

REPEATS = 7
STEPS = 300


@dataclass
class Options:
    """Microseconds of the parts of an update."""

    env_id: str = "LunarLander-v3"
    """Gymnasium id of the environment."""
    minibatch_size: int = 64
    """Rows of a minibatch."""
    num_envs: int = NUM_ENVS
    """Environments."""


def microseconds(step: Callable[[int], object]) -> float:
    """Return how long a call takes: the median over repeats of the mean over STEPS calls."""
    means = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for t in range(STEPS):
            step(t)
        means.append((time.perf_counter() - start) / STEPS * 1e6)
    return median(means)


def environment_step(envs: VectorEnv) -> float:
    """Return the microseconds of a step of all environments with random actions."""
    envs.reset(seed=1)
    actions = np.random.default_rng(1).integers(envs.single_action_space.n, size=(STEPS, envs.num_envs))
    result = microseconds(lambda t: envs.step(actions[t]))
    envs.close()
    return result


def main(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    args = TorchArgs(env_id=options.env_id, num_envs=options.num_envs, per_rank_batch_size=options.minibatch_size)
    gymnasiums = SyncVectorEnv(
        [lambda: gym.make(args.env_id)] * options.num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    environment = min(environment_step(gymnasiums), environment_step(make_envs(args, options.num_envs)))

    observation_space, action_space = read_spaces(args)
    agent = Agent(observation_space, action_space, args)
    policy = make_policy(agent)
    observations = np.zeros((options.num_envs, *observation_space.shape), dtype=np.float32)
    noise = draw_action_noise(agent.distribution, STEPS, range(options.num_envs), args.seed, 1).numpy()
    rollout = torch.zeros(ROLLOUT_LENGTH, *observations.shape)
    actions = agent.distribution.empty_actions(*rollout.shape[:2])
    with torch.no_grad():
        evaluation = microseconds(lambda t: agent(rollout, actions))
    policy_step = microseconds(lambda t: policy(observations, noise[t])) + evaluation / ROLLOUT_LENGTH

    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    zeros = Batch.zeros(options.minibatch_size, observation_space, agent.distribution)
    minibatch = Batch(*(torch.randn_like(field) if field.is_floating_point() else field for field in zeros))
    step = compile_gradient_step(
        lambda minibatch, rows: minibatch.values, agent, optimizer, args, minibatch, lambda tensor: tensor, world_size=1
    )
    gradient_step = microseconds(lambda t: step(minibatch, options.minibatch_size))
    parts = {"environment": environment, "policy": policy_step, "gradient": gradient_step}
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        keep_to_own_cores(read_ranks())
        weights = torch.zeros(sum(parameter.numel() for parameter in agent.parameters()))
        # After a gradient step, because a process that waits meanwhile takes longer to wake than one that is busy.
        both = microseconds(lambda t: (step(minibatch, options.minibatch_size), dist.all_reduce(weights)))
        parts["all_reduce"] = both - gradient_step
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(parts))
    if "RANK" in os.environ:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
