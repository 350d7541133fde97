"""Train stable-baselines3's PPO, with its published tuned settings or with ours, and evaluate it.

    python -m benchmarks.learning_stable_baselines3 --env-id LunarLander-v3 --settings published --seed 1

It ends with a line of JSON, see `benchmarks.learning`.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization
from torch import nn

from benchmarks.rivals import process_start
from rl.args import CommonArgs
from rl.presets import PRESETS

WINDOW = 100  # training episodes; that many are also what stable-baselines3 keeps


def falling(initial: float) -> Callable[[float], float]:
    """Return a schedule that falls linearly to zero, as a function of the remaining part of the run."""
    return lambda remaining: remaining * initial


WIDE = {"log_std_init": -2, "ortho_init": False, "activation_fn": nn.ReLU, "net_arch": [256, 256]}

# Of RL Baselines3 Zoo, hyperparams/ppo.yml; LunarLander's are those of LunarLander-v2, MuJoCo's those of version 4.
PUBLISHED = {
    "CartPole-v1": (
        100_000,
        {
            "n_envs": 8,
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 20,
            "learning_rate": falling(0.001),
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "clip_range": falling(0.2),
            "ent_coef": 0.0,
        },
    ),
    "LunarLander-v3": (
        1_000_000,
        {
            "n_envs": 16,
            "n_steps": 1024,
            "batch_size": 64,
            "n_epochs": 4,
            "gamma": 0.999,
            "gae_lambda": 0.98,
            "ent_coef": 0.01,
        },
    ),
    "HalfCheetah-v5": (
        1_000_000,
        {
            "n_envs": 1,
            "normalize": True,
            "n_steps": 512,
            "batch_size": 64,
            "n_epochs": 20,
            "learning_rate": 2.0633e-05,
            "gamma": 0.98,
            "gae_lambda": 0.92,
            "clip_range": 0.1,
            "ent_coef": 0.000401762,
            "vf_coef": 0.58096,
            "max_grad_norm": 0.8,
            "policy_kwargs": WIDE,
        },
    ),
    "Hopper-v5": (
        1_000_000,
        {
            "n_envs": 1,
            "normalize": True,
            "n_steps": 512,
            "batch_size": 32,
            "n_epochs": 5,
            "learning_rate": 9.80828e-05,
            "gamma": 0.999,
            "gae_lambda": 0.99,
            "clip_range": 0.2,
            "ent_coef": 0.00229519,
            "vf_coef": 0.835671,
            "max_grad_norm": 0.7,
            "policy_kwargs": WIDE,
        },
    ),
}


def ours(env_id: str) -> tuple[int, dict[str, Any]]:
    """Return the environment steps and the settings of our preset for one process."""
    (preset,) = (preset for preset in PRESETS.values() if preset.flags["env_id"] == env_id)
    args = CommonArgs(**preset.flags)
    policy = {
        "net_arch": list(args.hidden_sizes),
        "activation_fn": {"relu": nn.ReLU, "tanh": nn.Tanh}[args.activation_function],
        "ortho_init": args.ortho_init,
    }
    return args.total_timesteps, {
        "n_envs": args.num_envs,
        "n_steps": args.num_steps // args.num_envs,
        "batch_size": args.per_rank_batch_size,
        "n_epochs": args.update_epochs,
        "learning_rate": falling(args.learning_rate) if args.anneal_lr else args.learning_rate,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": args.clip_coef,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef,
        "max_grad_norm": args.max_grad_norm,
        "policy_kwargs": policy,
    }


@dataclass
class Options:
    """What is trained."""

    env_id: Literal[tuple(PUBLISHED)] = "LunarLander-v3"
    """Gymnasium's id of the environment."""
    settings: Literal["published", "ours"] = "published"
    """Whose hyperparameters."""
    seed: int = 1
    """Of networks and environments."""
    episodes: int = 100
    """Greedy episodes of the test."""


class Curve(BaseCallback):
    """Remembers steps, seconds since the process started, and the mean return of the last episodes."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.points: list[tuple[int, float, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer
        if len(episodes) >= WINDOW:
            mean = sum(episode["r"] for episode in episodes) / len(episodes)
            self.points.append((self.num_timesteps, time.perf_counter() - self.start, mean))


def main(options: Options) -> None:
    """Train, evaluate, print."""
    curve = Curve(process_start())
    torch.set_num_threads(1)
    no_pictures = {"render_mode": None}  # the default, "rgb_array", slows LunarLander
    steps, settings = PUBLISHED[options.env_id] if options.settings == "published" else ours(options.env_id)
    normalize = settings.pop("normalize", False)
    envs = make_vec_env(options.env_id, settings.pop("n_envs"), seed=options.seed, env_kwargs=no_pictures)
    if normalize:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    with redirect_stdout(sys.stderr):
        model = PPO("MlpPolicy", envs, seed=options.seed, device="cpu", **settings).learn(steps, callback=curve)
        seconds = curve.points[-1][1]
        tests = make_vec_env(options.env_id, 10, seed=options.seed + 10_000, env_kwargs=no_pictures)
        if normalize:
            tests = VecNormalize(tests, training=False, norm_reward=False)
            sync_envs_normalization(envs, tests)
        mean, std = evaluate_policy(model, tests, options.episodes)
    print(
        json.dumps(
            {"steps": model.num_timesteps, "seconds": seconds, "curve": curve.points}
            | {"mean_return": float(mean), "std_return": float(std)}
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
