"""Stable-Baselines3's PPO."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries

import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from benchmarks import rivals


def train(library: Any, args: Namespace, version: str, **settings: Any) -> None:
    """Train with the PPO of stable-baselines3, or one of its make."""

    class ReportingPPO(library):
        """PPO that reports each update."""

        def train(self) -> None:
            """Optimize on a rollout."""
            super().train()
            report.update()

    report = rivals.Report()
    torch.set_num_threads(1)
    envs = make_vec_env(
        args.env_id,
        n_envs=rivals.NUM_ENVS,
        seed=args.seed,
        env_kwargs={"render_mode": None},  # its default, "rgb_array", slows LunarLander
    )
    ppo = ReportingPPO(
        "MlpPolicy",
        envs,
        learning_rate=args.learning_rate,
        n_steps=rivals.ROLLOUT_LENGTH,
        batch_size=args.minibatch_size,
        n_epochs=args.epochs,
        gamma=rivals.GAMMA,
        gae_lambda=rivals.GAE_LAMBDA,
        clip_range=rivals.CLIP,
        ent_coef=0.0,
        max_grad_norm=rivals.MAX_GRAD_NORM,
        policy_kwargs={"net_arch": list(rivals.HIDDEN_SIZES)},  # of each, actor and critic
        seed=args.seed,
        **settings,
    )
    ppo.learn(args.updates * rivals.STEPS_PER_UPDATE)
    report.end(args, version)


if __name__ == "__main__":
    train(PPO, rivals.make_parser(__doc__).parse_args(), stable_baselines3.__version__, device="cpu")
