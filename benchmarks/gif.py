"""A small GIF of a greedy episode of a trained agent.

python -m benchmarks.gif RUN_OR_CHECKPOINT assets/lander.gif
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from moviepy import VideoFileClip

from rl.environments.evaluation import evaluate
from rl.run.resuming import load_agent


@dataclass
class Options:
    """Record an episode as a GIF."""

    run_or_checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, whose last checkpoint is taken, or a checkpoint."""
    output: Annotated[Path, tyro.conf.Positional]
    """File of the GIF."""
    seed: int = 10_000
    """Seed of the episode."""
    width: int = 240
    """Pixels."""
    speed: float = 2.0
    """How many times faster than in the environment."""
    frames_per_second: int = 12
    """Of the GIF."""
    seconds: float = 10.0
    """Longest GIF; what comes later in the episode is left out."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment besides those of the run, for example camera_name=track."""


def main(options: Options) -> None:
    """Record, then make smaller."""
    agent, args = load_agent(options.run_or_checkpoint)
    args = replace(args, env_kwargs=(*args.env_kwargs, *options.env_kwargs))
    with tempfile.TemporaryDirectory() as folder:
        (episode_return,) = evaluate(agent, args, 1, options.seed, video_folder=Path(folder)).returns
        (video,) = Path(folder).glob("*.mp4")
        with VideoFileClip(str(video)) as clip:
            beginning = clip.subclipped(0, min(clip.duration, options.seconds * options.speed))
            small = beginning.resized(width=options.width).with_speed_scaled(options.speed)
            small.write_gif(str(options.output), fps=options.frames_per_second, logger=None)
    print(f"{options.output}: return {episode_return:.1f}, {options.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
