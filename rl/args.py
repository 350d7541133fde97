"""Every flag of the three scripts: its meaning, its default, its bounds, and what derives from it."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import tyro

from rl.presets import PRESETS

# Gradient steps that win back what compiling takes where nothing is cached, in C++ and with torch.compile
# (python -m benchmarks.compiling).
STEPS_FOR_CPP, STEPS_FOR_TORCH = 4_000, 14_000
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")  # of `fabric run`, those that train_fabric.py supports


class Bound(NamedTuple):
    """What the value of a flag must be; it stands beside the flag's field."""

    words: str
    holds: Callable[[Any], object]


AT_LEAST_1 = Bound("at least 1", lambda x: x >= 1)
FRACTION = Bound("between 0 and 1", lambda x: 0 <= x <= 1)
A_NUMBER = Bound("a number", lambda x: not math.isnan(x))
POSITIVE = Bound("a finite number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("a finite number of at least 0", lambda x: 0 <= x < math.inf)


@dataclass
class RunArgs:
    """The length of the run, and what it writes."""

    preset: Annotated[str | None, tyro.conf.arg(metavar=f"{{{','.join(sorted(PRESETS))}}}")] = None
    """Use flags tuned for an environment and one process (rl/presets.py); flags given beside it win."""
    total_timesteps: Annotated[int, AT_LEAST_1] = 98_304
    """Environment steps of the whole run, over all environments of all processes."""
    seed: Annotated[int, Bound("between 0 and 2**32 - 1", lambda x: 0 <= x < 2**32)] = 42
    """Seed from which every random number of the run derives."""
    exp_name: Annotated[
        str,
        Bound("letters, digits, '.', '_' and '-' only", lambda x: re.fullmatch(r"[\w.-]+", x)),
        Bound("at most 100 bytes long", lambda x: len(x.encode()) <= 100),  # the name of a file may have 255
    ] = "ppo"
    """Name of the experiment; the name of the run's folder contains it."""
    capture_video: bool = False
    """Record episodes as videos in train_videos/ and test_videos/ inside the run's folder."""
    test_episodes: Annotated[int, AT_LEAST_1] = 10
    """Episodes that the trained policy plays greedily after training; their mean return is logged."""
    max_test_steps: Annotated[int, AT_LEAST_1] = 27_000
    """Steps after which a test episode is cut if it has not ended."""
    eval_every: Annotated[int | None, AT_LEAST_1] = None
    """Updates from one evaluation to the next; without it there are none. An evaluation plays greedy episodes, always
    the same ones, and checkpoints/best.ckpt keeps the agent with the highest mean return."""
    eval_episodes: Annotated[int, AT_LEAST_1] = 10
    """Episodes of an evaluation, in equal shares for all processes that run environments."""
    stop_at: Annotated[float | None, A_NUMBER] = None
    """End the run after the first evaluation with at least this mean return (with --eval-every)."""
    logger: Annotated[tuple[Literal["tensorboard", "csv", "wandb"], ...], Bound("at least one", len)] = ("tensorboard",)
    """Where the curves go, one or several: TensorBoard's files, metrics.csv, W&B (requirements-wandb.txt)."""
    checkpoint_every: Annotated[int, AT_LEAST_1] = 1
    """Updates from one checkpoint to the next; the run writes one more when it ends or is stopped."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """Keep this many checkpoints, the newest, and delete older ones."""
    resume: Annotated[str | None, Bound("a run's folder or one of its checkpoints", lambda x: x != "")] = None
    """Continue a run, given its folder or one of its checkpoints. All other flags default to those of the run."""
    timeout: Annotated[float, Bound("above 0 and at most 1e6", lambda x: 0 < x <= 1e6)] = (
        60.0  # a timedelta has a limit
    )
    """Seconds that a process waits for another before the run fails; more than a rollout or an evaluation takes."""


@dataclass
class EnvironmentArgs:
    """The environment, and how it runs."""

    env_id: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment, as key=value pairs or JSON: gravity=-5 or '{"gravity": -5}'."""
    wrappers: Annotated[
        tuple[str, ...],
        Bound("names such as module:function", lambda names: all(re.fullmatch(r"[\w.]+:[\w.]+", x) for x in names)),
    ] = ()
    """Wrappers to put around each environment, the innermost first: minigrid.wrappers:ImgObsWrapper."""
    env_backend: Literal["gymnasium", "envpool"] = "gymnasium"
    """Library that runs the training environments. EnvPool (requirements-envpool.txt) has fewer, and is faster."""
    env_threads: Annotated[int, AT_LEAST_1] = 1
    """Threads in which EnvPool steps the environments of a process."""
    num_envs: Annotated[int, AT_LEAST_1] = 4
    """Environments in each process that runs environments."""
    frame_stack: Annotated[int | None, AT_LEAST_1] = None
    """Observations of the last steps that the agent sees at once; by default 4 in Atari games, else 1."""
    terminal_on_life_loss: bool = False
    """Let a lost life end an episode for the learner; the game and its return go on (Atari)."""
    clip_rewards: bool = False
    """Learn from the signs of the rewards, as is customary in Atari; returns are logged as they are."""
    normalize_observations: bool = False
    """Normalise observations by their running mean and variance over all ranks; images are not changed."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return over all ranks."""

    def env_arguments(self) -> dict[str, Any]:
        """Return the arguments of the environment that `env_kwargs` names.

        Raises:
            ValueError: with one line, if they are neither JSON nor key=value pairs.
        """
        arguments: dict[str, Any] = {}
        for text in self.env_kwargs:
            try:
                if text.startswith("{"):
                    arguments |= json.loads(text)
                else:
                    key, value = text.split("=", 1)
                    arguments[key] = _json_or_text(value)
            except ValueError:
                raise ValueError(f"--env-kwargs takes key=value pairs or a JSON object, got {text!r}") from None
        return arguments


@dataclass
class DataArgs:
    """How much data an update takes, and how it is split into minibatches."""

    num_steps: Annotated[int, AT_LEAST_1] = 1024
    """Environment steps gathered before each update, over all environments of all processes."""
    per_rank_batch_size: Annotated[int, AT_LEAST_1] = 64
    """Rows of each minibatch, in each process that optimizes."""
    update_epochs: Annotated[int, AT_LEAST_1] = 10
    """Passes over the gathered data in each update."""
    share_data: bool = False
    """Send all data to every process that optimizes; each trains on a part that is drawn anew in each epoch."""
    compile: Annotated[bool | None, tyro.conf.arg(metavar="| --no-compile")] = None
    """Compile the gradient step: that takes seconds and makes it several times faster. By default, long runs do it."""


@dataclass
class NetworkArgs:
    """The networks of the policy and of the value function."""

    hidden_sizes: Annotated[tuple[int, ...], Bound("sizes of at least 1", lambda x: min(x, default=1) >= 1)] = (64, 64)
    """Units of each hidden layer."""
    activation_function: Literal["relu", "tanh"] = "relu"
    """Activation of the hidden layers."""
    ortho_init: bool = False
    """Initialise the layers orthogonally instead of with PyTorch's defaults."""
    init_log_std: Annotated[float, Bound("a finite number", math.isfinite)] = 0.0
    """Logarithm of the standard deviation with which the noise of continuous actions begins."""


@dataclass
class PPOArgs:
    """Proximal Policy Optimization (Schulman et al. 2017)."""

    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of Adam."""
    anneal_lr: bool = True
    """Lower the learning rate linearly, to zero at the end of the run."""
    gamma: Annotated[float, FRACTION] = 0.999
    """Discount factor of the rewards."""
    gae_lambda: Annotated[float, FRACTION] = 0.98
    """Lambda of generalized advantage estimation: 0 trusts the value function, 1 trusts the returns."""
    clip_coef: Annotated[float, POSITIVE] = 0.2
    """Epsilon of the surrogate objective: how far the probability ratio may leave 1."""
    clip_vloss: bool = False
    """Use the larger of the clipped and the unclipped squared error of the values."""
    ent_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the entropy bonus in the loss."""
    vf_coef: Annotated[float, NOT_NEGATIVE] = 0.5
    """Weight of the value loss in the loss."""
    max_grad_norm: Annotated[float, POSITIVE] = 0.5
    """Largest norm of the gradients; larger ones are scaled down to it."""
    normalize_advantages: bool = True
    """Normalise the advantages of each update over all ranks."""
    target_kl: Annotated[float | None, POSITIVE] = None
    """End an update after the epoch in which the approximate KL divergence over all ranks exceeds this value."""
    noise_correlation: Annotated[float, Bound("at least 0 and below 1", lambda x: 0 <= x < 1)] = 0.0
    """Correlation of a continuous action's noise from one step to the next; noise that lasts explores further."""


@dataclass
class DeviceArgs:
    """The devices of the networks."""

    cuda: bool = False
    """Train on GPUs."""


@dataclass
class PlayerArgs:
    """The process that runs the environments."""

    player_on_gpu: bool = False
    """Run the policy of the player on a GPU, too (with --cuda)."""
    overlap: bool = False
    """Collect the next rollout while the trainers optimize, with weights that are one update old."""


# The groups of flags that --help shows, by their titles; the arguments of a script have the fields of its groups.
GROUPS = {
    "run": RunArgs,
    "environment": EnvironmentArgs,
    "data": DataArgs,
    "network": NetworkArgs,
    "ppo": PPOArgs,
    "device": DeviceArgs,
    "player": PlayerArgs,
}


@dataclass
class CommonArgs(PPOArgs, NetworkArgs, DataArgs, EnvironmentArgs, RunArgs):
    """The arguments that all three scripts share."""

    log_root: ClassVar[Path]

    def __post_init__(self) -> None:
        """Check the bounds of every flag.

        Raises:
            ValueError: with one line that names the flag, its bounds and the value.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            for bound in getattr(field.type, "__metadata__", ()):
                if isinstance(bound, Bound) and value is not None and not bound.holds(value):
                    raise ValueError(f"--{field.name.replace('_', '-')} must be {bound.words}, got {value!r}")
        self.env_arguments()
        if self.stop_at is not None and self.eval_every is None:
            raise ValueError("--stop-at needs --eval-every: evaluations decide when the run stops")
        if self.capture_video and self.env_backend == "envpool":
            raise ValueError("--capture-video goes with --env-backend gymnasium: EnvPool draws no pictures")
        if self.clip_rewards and self.normalize_rewards:
            raise ValueError("--clip-rewards and --normalize-rewards exclude each other")
        if self.terminal_on_life_loss and self.normalize_rewards:
            raise ValueError("--terminal-on-life-loss goes with --clip-rewards, not with --normalize-rewards")
        if self.env_backend == "envpool" and (self.wrappers or self.frame_stack or self.terminal_on_life_loss):
            raise ValueError("--wrappers, --frame-stack and --terminal-on-life-loss go with --env-backend gymnasium")
        if self.env_threads > 1 and self.env_backend == "gymnasium":
            raise ValueError(
                "--env-threads goes with --env-backend envpool: Gymnasium's environments step in one thread"
            )

    def check_processes(self, world_size: int) -> None:
        """Check what depends on the number of processes.

        Raises:
            ValueError: with one line that says what does not fit.
        """
        environments = self.num_envs * self.env_processes(world_size)
        if self.num_steps < environments:
            raise ValueError(
                f"--num-steps {self.num_steps} is below the number of environments, "
                f"{environments}: each must take at least one step per update"
            )
        if self.total_timesteps < self.num_steps:
            raise ValueError(
                f"--total-timesteps {self.total_timesteps} is below --num-steps {self.num_steps}: "
                "there would be no update, so nothing would be trained"
            )

    def env_processes(self, world_size: int) -> int:
        """Return how many processes run environments."""
        return world_size

    def network_bytes(self, num_features: int) -> int:
        """Return about how many bytes the networks take: weights, gradients and Adam's two moments, in float32.

        Args:
            num_features: the number of features of an observation that enter the first layer.
        """
        weights = sum((inputs + 1) * outputs for inputs, outputs in pairwise((num_features, *self.hidden_sizes)))
        return 2 * weights * 4 * 4

    def rollout_length(self, world_size: int) -> int:
        """Return T, the steps that each environment takes before an update."""
        return math.ceil(self.num_steps / (self.num_envs * self.env_processes(world_size)))

    def steps_per_update(self, world_size: int) -> int:
        """Return the environment steps of an update: `num_steps`, rounded up to equal shares of all environments."""
        return self.rollout_length(world_size) * self.num_envs * self.env_processes(world_size)

    @property
    def num_updates(self) -> int:
        """The number of updates of the run: it follows from the flags alone, whatever the number of processes."""
        return self.total_timesteps // self.num_steps

    def minibatches_per_epoch(self, num_rows: int, world_size: int) -> int:
        """Return how many gradient steps `world_size` processes, which share `num_rows` rows, take in an epoch."""
        return math.ceil(math.ceil(num_rows / world_size) / self.per_rank_batch_size)

    def gradient_steps(self, num_rows: int, world_size: int) -> int:
        """Return the number of gradient steps of the whole run.

        Args:
            num_rows: rows of an update, over all processes that optimize.
            world_size: the number of these processes.
        """
        return self.num_updates * self.update_epochs * self.minibatches_per_epoch(num_rows, world_size)

    def compiles(self, num_rows: int, world_size: int) -> bool:
        """Return whether the gradient step is compiled: as a flag says, else if that saves more time than it takes.

        Args:
            num_rows: rows of an update, over all processes that optimize.
            world_size: the number of these processes.
        """
        return self.gradient_steps(num_rows, world_size) >= STEPS_FOR_CPP if self.compile is None else self.compile

    def evaluates_after(self, update: int) -> bool:
        """Return whether the agent is evaluated after an update: after every `eval_every`-th, and after the last."""
        return self.eval_every is not None and (update % self.eval_every == 0 or update == self.num_updates)

    def is_solved_by(self, best_return: float | None) -> bool:
        """Return whether the highest mean return of an evaluation ends the run."""
        return self.stop_at is not None and best_return is not None and best_return >= self.stop_at

    def learning_rate_at(self, update: int) -> float:
        """Return the learning rate of an update, counted from 1."""
        return self.learning_rate * (1 - (update - 1) / self.num_updates) if self.anneal_lr else self.learning_rate


@dataclass
class TorchArgs(DeviceArgs, CommonArgs):
    """PPO in raw PyTorch with DistributedDataParallel."""

    log_root: ClassVar[Path] = Path("logs/torch_logs")


@dataclass
class FabricArgs(CommonArgs):
    """PPO with Lightning Fabric; `fabric run` takes the devices, the accelerator and the strategy."""

    log_root: ClassVar[Path] = Path("logs/fabric_logs")

    def check_processes(self, world_size: int) -> None:
        """Check what depends on the number of processes; where `fabric run` has not said so, Fabric takes the CPU.

        Raises:
            ValueError: with one line that says what does not fit.
        """
        if world_size > 1 and "LT_CLI_USED" not in os.environ:
            raise ValueError("several processes of train_fabric.py are started with `fabric run`, see README.md")
        _check_precision()
        if (strategy := os.environ.get("LT_STRATEGY", "auto")) not in STRATEGIES:
            raise ValueError(f"--strategy={strategy} is not supported: train_fabric.py runs with --strategy=ddp")
        if (accelerator := os.environ.get("LT_ACCELERATOR")) in ("gpu", "cuda"):
            from torch import cuda  # here, so that only a run on a GPU waits for torch before its flags are checked

            if not cuda.is_available():
                raise ValueError(
                    f"--accelerator={accelerator} needs a GPU, and PyTorch sees none: choose --accelerator=cpu"
                )
        os.environ.setdefault("LT_ACCELERATOR", "cpu")
        os.environ.setdefault("LT_DEVICES", "1")
        super().check_processes(world_size)


@dataclass
class DecoupledArgs(PlayerArgs, DeviceArgs, CommonArgs):
    """PPO with Lightning Fabric, one player that runs the environments and N trainers that optimize."""

    log_root: ClassVar[Path] = Path("logs/fabric_decoupled_logs")

    def __post_init__(self) -> None:
        """Check the bounds of every flag.

        Raises:
            ValueError: with one line that names the flag, its bounds and the value.
        """
        super().__post_init__()
        if self.player_on_gpu and not self.cuda:
            raise ValueError("--player-on-gpu needs --cuda: without it nothing runs on a GPU")

    def check_processes(self, world_size: int) -> None:
        """Check what depends on the number of processes.

        Raises:
            ValueError: with one line that says what does not fit.
        """
        if world_size < 2:
            raise ValueError(
                "one process is too few for a player and a trainer: "
                "start with `fabric run --devices=2 train_fabric_decoupled.py`, or more devices"
            )
        if "," in (devices := os.environ.get("LT_DEVICES", "")):
            raise ValueError(
                f"--devices={devices}: train_fabric_decoupled.py wants a number of processes; "
                f"CUDA_VISIBLE_DEVICES={devices} before the command chooses GPUs"
            )
        _check_precision()
        super().check_processes(world_size)
        if (trainers := world_size - 1) > (steps := self.steps_per_update(world_size)):
            raise ValueError(f"{trainers} trainers cannot share {steps} experiences: raise --num-steps")

    def env_processes(self, world_size: int) -> int:
        """Return how many processes run environments: the player alone."""
        return 1


def _check_precision() -> None:
    """Check the precision that `fabric run` was given: the scripts compute in float32 only.

    Raises:
        ValueError: with one line, if it is not float32.
    """
    if (precision := os.environ.get("LT_PRECISION", "32-true")) not in ("32", "32-true"):
        raise ValueError(f"--precision={precision} is not supported: the scripts train in --precision=32-true")


def _json_or_text(value: str) -> Any:
    """Return what `value` means in JSON or, for True, False and None, in Python, else `value` itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return value
