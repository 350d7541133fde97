"""Steps per second of Gymnasium's and EnvPool's environments, alone and in rollouts, on one thread.

    python -m benchmarks.env_backends

Interleaved repeats on one machine; medians, and the ratio of each repeat's pair.
"""

import time
from dataclasses import replace
from itertools import product
from statistics import median

import numpy as np
import torch

from benchmarks.raw import keep
from rl.args import CommonArgs
from rl.environments.making import make_envs, read_spaces, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise

REPEATS = 5
STEPS = 16_384  # of all environments, in each repeat


def seconds_alone(args: CommonArgs) -> float:
    """Return how long the environments take for STEPS steps with random actions."""
    envs = make_envs(args, args.num_envs)
    reset_envs(envs, args.seed, 0)
    actions = np.random.default_rng(0).integers(
        envs.single_action_space.n, size=(STEPS // args.num_envs, args.num_envs)
    )
    start = time.perf_counter()
    for step_actions in actions:
        envs.step(step_actions)
    seconds = time.perf_counter() - start
    envs.close()
    return seconds


def seconds_in_rollout(args: CommonArgs) -> float:
    """Return how long a rollout of STEPS steps takes with a small policy."""
    torch.manual_seed(0)
    agent = Agent(*read_spaces(args), args)
    envs = make_envs(args, args.num_envs)
    observations = reset_envs(envs, args.seed, 0)
    noise = draw_action_noise(agent.distribution, STEPS // args.num_envs, range(args.num_envs), args.seed, 1)
    start = time.perf_counter()
    collect_rollout(agent, envs, observations, noise)
    seconds = time.perf_counter() - start
    envs.close()
    return seconds


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    raw = []
    print("| environment | environments | | Gymnasium, steps/s | EnvPool, steps/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for env_id, num_envs, measure in product(
        ("CartPole-v1", "LunarLander-v3"), (8, 64), (seconds_alone, seconds_in_rollout)
    ):
        gymnasium = CommonArgs(env_id=env_id, num_envs=num_envs)
        envpool = replace(gymnasium, env_backend="envpool")
        pairs = [(measure(gymnasium), measure(envpool)) for _ in range(REPEATS)]
        speeds = (STEPS / median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = median(slow / fast for slow, fast in pairs)
        label = "alone" if measure is seconds_alone else "in a rollout"
        print(f"| {env_id} | {num_envs} | {label} |", *(f"{speed:,.0f} |" for speed in speeds), f"{ratio:.1f} |")
        setting = {"env_id": env_id, "num_envs": num_envs, "measured": label}
        raw += [setting | {"gymnasium_seconds": slow, "envpool_seconds": fast} for slow, fast in pairs]
    keep("env_backends", raw)


if __name__ == "__main__":
    main()
