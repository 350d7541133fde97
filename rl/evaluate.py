"""Evaluation: whole episodes of a trained agent.

    python -m rl.evaluate RUN_OR_CHECKPOINT [--episodes 100] [--seed 10000] [--stochastic] [--video DIR]

The run alone says which environment, which network and which statistics; the last line is for programs:
`mean_return=243.10 std_return=31.20 episodes=100`.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: this file is a module: start it with `python -m rl.evaluate`, in the folder that holds rl/")

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from rl.environments.evaluation import evaluate
from rl.environments.making import check_video
from rl.run.command_line import parse_options
from rl.run.resuming import load_agent
from rl.voice import RunError, fail


@dataclass
class EvaluateArgs:
    """Run whole episodes of a trained agent and print what they gave."""

    run_or_checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, whose last checkpoint is taken, or a checkpoint."""
    episodes: int = 100
    """Number of episodes."""
    seed: int = 10_000
    """Seed of the episodes."""
    stochastic: bool = False
    """Sample the actions instead of taking the greedy ones."""
    max_steps: int | None = None
    """Steps after which an episode that has not ended is cut; by default as many as in the run's own test."""
    video: Path | None = None
    """Folder into which every episode is recorded."""


def main() -> None:
    """Evaluate from the command line."""
    options = parse_options(EvaluateArgs)
    torch.set_num_threads(1)
    try:
        for flag, value in (("--episodes", options.episodes), ("--max-steps", options.max_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        agent, args = load_agent(options.run_or_checkpoint)
        args = replace(args, max_test_steps=options.max_steps or args.max_test_steps)
        if options.video:
            check_video(args)
        results = evaluate(
            agent, args, options.episodes, options.seed, options.stochastic, options.video, progress=True
        )
    except (ValueError, RunError) as error:
        fail(str(error))
    for name, values in zip(("return", "length"), results, strict=True):
        print(f"{name}: mean {values.mean():.2f}, std {values.std():.2f}, min {values.min():g}, max {values.max():g}")
    returns = results.returns
    print(f"mean_return={returns.mean():.2f} std_return={returns.std():.2f} episodes={len(returns)}")


if __name__ == "__main__":
    main()
