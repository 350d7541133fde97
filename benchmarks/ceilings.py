"""What no program can be faster than: the parts of an update alone, each in a tight loop.

    python -m benchmarks.ceilings --env-id LunarLander-v3 --minibatch-size 64 --gradient-steps 320

Prints a line of JSON: microseconds of an update's steps of all environments (Gymnasium's or ours, whichever is faster),
of its policy steps for them (actions, and with them log-probabilities and values, which cost least for a whole rollout
at once), and of its compiled gradient steps. Started by `torchrun` it measures all processes at once, and also an
all-reduce of as many numbers as there are weights after each gradient step.
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
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from benchmarks.compiling import make_gradient_step, random_minibatch
from benchmarks.rivals import NUM_ENVS, ROLLOUT_LENGTH
from rl.args import TorchArgs
from rl.environments.making import make_envs, read_spaces
from rl.fast.gradient_step import compile_gradient_step
from rl.fast.policy import make_policy
from rl.fast.shared_memory import use_shared_memory
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.processes.placement import keep_to_own_cores

ROUNDS = 40


@dataclass
class Options:
    """Microseconds of the parts of an update."""

    env_id: str = "LunarLander-v3"
    """Gymnasium id of the environment."""
    minibatch_size: int = 64
    """Rows of a minibatch."""
    gradient_steps: int = 320
    """Gradient steps of an update."""
    num_envs: int = NUM_ENVS
    """Environments."""


def main(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    args = TorchArgs(
        env_id=options.env_id,
        num_envs=options.num_envs,
        per_rank_batch_size=options.minibatch_size,
        compile=True,
    )
    gymnasiums = SyncVectorEnv(
        [lambda: gym.make(args.env_id)] * options.num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    ours = make_envs(args, options.num_envs)
    gymnasiums.reset(seed=1), ours.reset(seed=1)
    random_actions = np.random.default_rng(1).integers(
        gymnasiums.single_action_space.n, size=(ROLLOUT_LENGTH, options.num_envs)
    )

    observation_space, action_space = read_spaces(args)
    agent = Agent(observation_space, action_space, args)
    observations = np.zeros((options.num_envs, *observation_space.shape), dtype=np.float32)
    policy = make_policy(agent, observations)
    noise = draw_action_noise(agent.distribution, ROLLOUT_LENGTH, range(options.num_envs), args.seed, 1).numpy()
    rollout = torch.zeros(ROLLOUT_LENGTH, *observations.shape)
    actions = agent.distribution.empty_actions(*rollout.shape[:2])
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    minibatch = random_minibatch(agent, options.minibatch_size)
    shown = make_gradient_step(agent, optimizer, args)
    step = compile_gradient_step(shown, agent, optimizer, args, options.minibatch_size)
    parts: dict[str, tuple[Callable[[int], object], int]] = {  # and how often an update calls them
        "gymnasium": (lambda t: gymnasiums.step(random_actions[t]), ROLLOUT_LENGTH),
        "ours": (lambda t: ours.step(random_actions[t]), ROLLOUT_LENGTH),
        "action": (lambda t: policy(observations, noise[t]), ROLLOUT_LENGTH),
        "evaluation": (lambda _: agent(rollout, actions), 1),
        "gradient": (lambda _: step.fast(minibatch, options.minibatch_size), options.gradient_steps),
    }
    if distributed := "RANK" in os.environ:
        use_shared_memory()
        dist.init_process_group("shared")
        keep_to_own_cores()
        weights = torch.zeros(sum(parameter.numel() for parameter in agent.parameters()))
        # After a gradient step, because a process that waits meanwhile takes longer to wake than one that is busy.
        parts["gradient, all_reduce"] = (
            lambda _: (step.fast(minibatch, options.minibatch_size), dist.all_reduce(weights)),
            options.gradient_steps,
        )

    # The parts take turns, so that what else the machine does befalls all alike.
    means: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, (call, calls) in parts.items():
            if distributed:
                dist.barrier()
            start = time.perf_counter()
            with torch.no_grad():
                for t in range(calls):
                    call(t)
            means[name].append((time.perf_counter() - start) / calls * 1e6)
    medians = {name: median(values) for name, values in means.items()}
    printed = {
        "environment": min(medians["gymnasium"], medians["ours"]),
        "policy": medians["action"] + medians["evaluation"] / ROLLOUT_LENGTH,
        "gradient": medians["gradient"],
    }
    if distributed:
        printed["all_reduce"] = medians["gradient, all_reduce"] - medians["gradient"]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(printed))
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
