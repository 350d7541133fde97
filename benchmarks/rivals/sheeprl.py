"""SheepRL's PPO."""

import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries

import torch
from sheeprl.algos.ppo import ppo
from sheeprl.cli import run

from benchmarks import rivals


def main(args: Namespace) -> None:
    """Train."""
    report = rivals.Report()
    torch.set_num_threads(1)
    train = ppo.train

    def train_and_report(*args: Any) -> int:
        gradient_steps = train(*args)
        report.update()
        return gradient_steps

    ppo.train = train_and_report
    (hidden_size,) = set(rivals.HIDDEN_SIZES)
    with TemporaryDirectory() as folder:
        sys.argv[1:] = [
            "exp=ppo_benchmarks",  # its own choice for speed: no log, no checkpoints, the rollout in memory
            f"log_root={folder}",
            f"hydra.run.dir={folder}",
            f"seed={args.seed}",
            f"env.id={args.env_id}",
            "env.wrapper.render_mode=null",  # its default, rgb_array, slows LunarLander
            f"env.num_envs={rivals.NUM_ENVS}",
            f"algo.rollout_steps={rivals.ROLLOUT_LENGTH}",
            f"algo.total_steps={args.updates * rivals.STEPS_PER_UPDATE}",
            f"algo.per_rank_batch_size={args.minibatch_size}",
            f"algo.update_epochs={args.epochs}",
            f"algo.optimizer.lr={args.learning_rate}",
            f"algo.gamma={rivals.GAMMA}",
            f"algo.gae_lambda={rivals.GAE_LAMBDA}",
            f"algo.clip_coef={rivals.CLIP}",
            f"algo.max_grad_norm={rivals.MAX_GRAD_NORM}",
            f"algo.dense_units={hidden_size}",
            "algo.encoder.mlp_layers=0",  # actor and critic share nothing
            f"algo.actor.mlp_layers={len(rivals.HIDDEN_SIZES)}",
            f"algo.critic.mlp_layers={len(rivals.HIDDEN_SIZES)}",
            f"algo.gae_method={args.gae_method}",
            f"algo.compile.enabled={args.compile}",
            "algo.compile.mode=default",
        ]
        run()
    report.end(args, version("sheeprl"))


if __name__ == "__main__":
    parser = rivals.make_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the step of the player")
    parser.add_argument("--gae-method", default="loop", choices=["loop", "log_scan"])
    main(parser.parse_args())
