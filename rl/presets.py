"""Presets: flags tuned for an environment and one process, and the return that they reach."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Flags that differ from the defaults, and what a run with them reaches."""

    flags: dict[str, Any]  # values by the names of the arguments; the number of steps is among them
    result: str


NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}
# For MuJoCo, with what most of its users set alike (Andrychowicz et al. 2021, "What Matters for On-Policy Deep
# Actor-Critic Methods?"): tanh, a small first policy, little noise, everything normalised.
MUJOCO = {
    "total_timesteps": 1_000_000,
    "num_envs": 8,
    "num_steps": 2048,
    "learning_rate": 3e-4,
    "activation_function": "tanh",
    "ortho_init": True,
    "init_log_std": -1.0,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "vf_coef": 0.25,
} | NORMALIZED

PRESETS = {
    "cartpole": Preset(
        {"env_id": "CartPole-v1"}, "a return of 500.0 after 98,304 steps (interquartile mean of 16 seeds)"
    ),
    "acrobot": Preset(
        {
            "env_id": "Acrobot-v1",
            "total_timesteps": 500_000,
            "num_envs": 16,
            "num_steps": 2048,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "ent_coef": 0.01,
            "target_kl": 0.05,
        }
        | NORMALIZED,
        "a return of -71.4 after 499,712 steps (interquartile mean of 10 seeds)",
    ),
    "mountain-car": Preset(
        {
            "env_id": "MountainCar-v0",
            "total_timesteps": 1_000_000,
            "num_envs": 16,
            "num_steps": 4096,
            "per_rank_batch_size": 256,
            "ent_coef": 0.01,
        }
        | NORMALIZED,
        "a return of -98.0 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    "mountain-car-continuous": Preset(
        {
            "env_id": "MountainCarContinuous-v0",
            "total_timesteps": 100_000,
            "num_steps": 2048,
            "learning_rate": 3e-4,
            "gamma": 0.9999,
            "gae_lambda": 0.9,
            "noise_correlation": 0.9,
        }
        | NORMALIZED,
        "a return of 95.4 after 98,304 steps (interquartile mean of 10 seeds)",
    ),
    "pendulum": Preset(
        {
            "env_id": "Pendulum-v1",
            "total_timesteps": 100_352,
            "gamma": 0.9,
            "gae_lambda": 0.95,
            "normalize_rewards": True,
            "target_kl": 0.03,
        },
        "a return of -174.0 after 100,352 steps (interquartile mean of 10 seeds)",
    ),
    "lunar-lander": Preset(
        {
            "env_id": "LunarLander-v3",
            "total_timesteps": 500_000,
            "num_steps": 2048,
            "per_rank_batch_size": 128,
            "ortho_init": True,
        },
        "a return of 277.4 after 499,712 steps (interquartile mean of 16 seeds)",
    ),
    # Rollouts of half the length left twice as many landings that end in a fall (docs/ablation.md).
    "lunar-lander-continuous": Preset(
        {
            "env_id": "LunarLanderContinuous-v3",
            "total_timesteps": 1_000_000,
            "num_envs": 16,
            "num_steps": 4096,
            "per_rank_batch_size": 128,
            "learning_rate": 5e-4,
            "ortho_init": True,
            "normalize_rewards": True,
            "target_kl": 0.1,
        },
        "a return of 284.4 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    "bipedal-walker": Preset(
        {
            "env_id": "BipedalWalker-v3",
            "total_timesteps": 2_000_000,
            "num_envs": 8,
            "num_steps": 8192,
            "per_rank_batch_size": 256,
            "learning_rate": 3e-4,
            "init_log_std": -0.5,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "ortho_init": True,
        }
        | NORMALIZED,
        "a return of 310.1 after 1,998,848 steps (interquartile mean of 10 seeds)",
    ),
    # An action lasts for four frames, so a step is four of the game's.
    "car-racing": Preset(
        {
            "env_id": "CarRacing-v3",
            "wrappers": ("gymnasium.wrappers:MaxAndSkipObservation",),
            "total_timesteps": 80_000,
            "num_envs": 8,
            "update_epochs": 8,
            "hidden_sizes": (256,),
            "learning_rate": 3e-4,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "init_log_std": -0.5,
            "ortho_init": True,
            "normalize_rewards": True,
            "target_kl": 0.03,
        },
        "a return of 673.9 after 79,872 steps (interquartile mean of 3 seeds)",
    ),
    "half-cheetah": Preset(
        {"env_id": "HalfCheetah-v5"} | MUJOCO,
        "a return of 5,933 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    "hopper": Preset(
        {"env_id": "Hopper-v5"} | MUJOCO,
        "a return of 3,305 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    "walker2d": Preset(
        {"env_id": "Walker2d-v5"} | MUJOCO,
        "a return of 3,978 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    # Without the forces of contact, 78 numbers that Ant-v4 left out, too. Unbounded, a rare update has a KL above 0.1.
    "ant": Preset(
        {"env_id": "Ant-v5", "env_kwargs": ("include_cfrc_ext_in_observation=false",), "target_kl": 0.1} | MUJOCO,
        "a return of 3,639 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    # Most steps balance already: long rollouts hold more falls, and normalised by such steps a fall goes far out.
    "inverted-double-pendulum": Preset(
        {"env_id": "InvertedDoublePendulum-v5"}
        | MUJOCO
        | {"num_steps": 8192, "per_rank_batch_size": 256, "init_log_std": 0.0, "normalize_observations": False},
        "a return of 9,236 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    "minatar": Preset(
        {
            "env_id": "MinAtar/Breakout-v1",
            "total_timesteps": 1_000_000,
            "num_envs": 16,
            "num_steps": 2048,
            "per_rank_batch_size": 256,
            "update_epochs": 4,
            "hidden_sizes": (64,),
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "ent_coef": 0.01,
            "ortho_init": True,
        },
        "a return of 19.9 after 999,424 steps (interquartile mean of 10 seeds)",
    ),
    # What is customary in Atari (Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization").
    "atari": Preset(
        {
            "env_id": "ALE/Pong-v5",
            "total_timesteps": 10_000_000,
            "num_envs": 8,
            "num_steps": 1024,
            "per_rank_batch_size": 256,
            "update_epochs": 4,
            "hidden_sizes": (),
            "learning_rate": 2.5e-4,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "clip_coef": 0.1,
            "clip_vloss": True,
            "ent_coef": 0.01,
            "ortho_init": True,
            "terminal_on_life_loss": True,
            "clip_rewards": True,
        },
        "no return of ours: its 10 million steps take about 20 hours on one core",
    ),
}
