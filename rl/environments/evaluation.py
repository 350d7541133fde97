"""Whole episodes of an agent: what the test after a run and `python -m rl.evaluate` have in common."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from rl.args import CommonArgs
from rl.environments.making import make_envs, record_first_episode, reset_envs
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.seeding import Purpose
from rl.spaces import stored_dtype
from rl.voice import RunError, say

AT_ONCE = 100  # environments that step together
NOISE_STEPS = 256  # steps for which action noise is drawn at once


class Results(NamedTuple):
    """What the episodes gave."""

    returns: np.ndarray  # float64 [episodes]
    lengths: np.ndarray  # int64 [episodes]


@torch.no_grad()
def evaluate(
    agent: Agent,
    args: CommonArgs,
    episodes: int,
    seed: int,
    stochastic: bool = False,
    video_folder: Path | None = None,
    purpose: Purpose = Purpose.TEST,
    first: int = 0,
    progress: bool = False,
) -> Results:
    """Run whole episodes, with the statistics of normalisation as they are.

    Episode k has its own seed, so the episodes are the same however many run at once. Each environment runs one
    episode only: to take the first that end would favour short ones. One without an end is cut.

    Args:
        agent: the policy.
        args: of the environment, and `max_test_steps`, after which an episode is cut.
        episodes: number of episodes.
        seed: seed of the test.
        stochastic: sample the actions instead of taking the greedy ones.
        video_folder: where every episode is recorded. They then run one by one, since the frames of a whole
            episode are held in memory.
        purpose: the kind of their random streams.
        first: the number of the first episode.
        progress: show on a terminal how many episodes have ended.

    Raises:
        RunError: if an environment fails, or a reward is not finite; it names the environment or the episode.
    """
    device = next(agent.parameters()).device
    args = replace(args, env_backend="gymnasium", env_threads=1)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    at_once = 1 if video_folder else AT_ONCE
    bar = tqdm(total=episodes, unit=" episodes", disable=None if progress else True, leave=False)
    for done in range(0, episodes, at_once):
        running = range(first + done, first + min(done + at_once, episodes))
        record = record_first_episode(video_folder, f"test-{done}") if video_folder else None
        envs = make_envs(args, len(running), record)
        dtype = getattr(torch, stored_dtype(envs.single_observation_space))
        observations = reset_envs(envs, seed, running[0], purpose)
        block = slice(done, done + len(running))
        ended = np.zeros(len(running), dtype=bool)
        step = 0
        while not ended.all():
            observed = agent.observation_normalizer(torch.tensor(observations, dtype=dtype, device=device))
            if stochastic:
                if step % NOISE_STEPS == 0:
                    noise = draw_action_noise(agent.distribution, NOISE_STEPS, running, seed, step).to(device)
                actions = agent.act(observed, noise[step % NOISE_STEPS])
            else:
                actions = agent.act_greedily(observed)
            observations, rewards, _, _, info = envs.step(agent.distribution.to_env(actions.cpu()).numpy())
            if len(faulty := np.flatnonzero(~np.isfinite(rewards) & ~ended)):
                what = f"a NaN or infinite reward in step {step}: {rewards[faulty[0]]}"
                raise RunError(f"{purpose.name.lower()} episode {running[faulty[0]]} has {what}")
            if "episode" in info:
                first_end = info["_episode"] & ~ended
                returns[block][first_end] = info["episode"]["r"][first_end]
                lengths[block][first_end] = info["episode"]["l"][first_end]
                ended |= first_end
                bar.update(int(first_end.sum()))
            step += 1
            if step == args.max_test_steps and not ended.all():
                endless = ~ended
                returns[block][endless], lengths[block][endless] = envs.episode_returns[endless], step
                ended[:] = True
                kind = f"{endless.sum()} {purpose.name.lower()} episodes"
                say(f"{kind} had no end after {step} steps and count as they stood")
        envs.close()
    bar.close()
    return Results(returns, lengths)
