"""What exact resume costs: environments that remember their actions, and writing a checkpoint.

    python -m benchmarks.checkpoints

Interleaved repeats on one machine, one thread; medians.
"""

import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from benchmarks.raw import keep
from rl.args import CommonArgs
from rl.environments.collector import Collector
from rl.environments.making import read_spaces, reset_envs
from rl.ppo.agent import Agent
from rl.run.checkpoints import Checkpoints

ENV_IDS = ("CartPole-v1", "LunarLander-v3", "BipedalWalker-v3")
REPEATS = 31
STEPS = 1024  # of each environment, in each repeat


def forgetful_envs(args: CommonArgs) -> VectorEnv:
    """Return the same environments in Gymnasium's own classes, which remember nothing."""
    return RecordEpisodeStatistics(
        SyncVectorEnv(
            [partial(gym.make, args.env_id)] * args.num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
        )
    )


def seconds_for(envs: VectorEnv, actions: np.ndarray) -> float:
    """Return how long the environments take for some actions."""
    reset_envs(envs, 0, 0)
    start = time.perf_counter()
    for step_actions in actions:
        envs.step(step_actions)
    return time.perf_counter() - start


def main() -> None:
    """Measure every environment and print a table."""
    torch.set_num_threads(1)
    print("| environment | µs per step more than Gymnasium's classes | % | checkpoint, kB | gather and write, ms |")
    print("|" + " --- |" * 5)
    raw = []
    for env_id in ENV_IDS:
        args = CommonArgs(env_id=env_id, num_envs=8, total_timesteps=REPEATS * CommonArgs.num_steps)
        collector, plain = Collector(args, rank=0, world_size=1), forgetful_envs(args)
        envs = collector.envs
        envs.action_space.seed(0)
        actions = np.array([envs.action_space.sample() for _ in range(STEPS)])
        pairs = np.array([(seconds_for(envs, actions), seconds_for(plain, actions)) for _ in range(REPEATS)])
        extra = np.median(pairs[:, 0] - pairs[:, 1])
        microseconds, percent = 1e6 * extra / (STEPS * args.num_envs), 100 * extra / np.median(pairs[:, 1])

        agent = Agent(*read_spaces(args), args)
        optimizer = torch.optim.Adam(agent.parameters())
        sum(parameter.sum() for parameter in agent.parameters()).backward()
        optimizer.step()
        reset_envs(envs, 0, 0)
        for step_actions in actions:
            envs.step(step_actions)
        seconds = []
        with TemporaryDirectory(dir=".") as folder:
            checkpoints = Checkpoints(Path(folder), args, gather=None)
            for update in range(1, REPEATS + 1):
                start = time.perf_counter()
                envs.mark(update)
                checkpoints.add(update, agent.state_dict(), optimizer, {}, collector)
                seconds.append(time.perf_counter() - start)
            kilobytes = max(path.stat().st_size for path in Path(folder).glob("*/*.ckpt")) / 1000
        figures = (f"{microseconds:.2f}", f"{percent:.1f}", f"{kilobytes:.0f}", f"{1000 * median(seconds):.1f}")
        print("|", env_id, "|", " | ".join(figures), "|")
        kept = zip(pairs.tolist(), seconds, strict=True)
        raw += [{"env_id": env_id, "ours_s": o, "gymnasium_s": g, "checkpoint_s": c} for (o, g), c in kept]
    keep("checkpoints", raw)


if __name__ == "__main__":
    main()
