"""Every flag of the three scripts: its meaning, its default, its bounds, and what derives from it."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

import tyro

from rl.presets import PRESETS

# Seconds that compiling the gradient step takes where nothing is cached, and that each step then saves, for one process
# and for several: python -m benchmarks.compiling
COMPILING_ALONE, SAVED_ALONE = 7.5, 0.55e-3
COMPILING_TOGETHER, SAVED_TOGETHER = 11.0, 1.0e-3
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")  # of `fabric run`, those that train_fabric.py follows


class Bound(NamedTuple):
    """What the value of a flag must be; a value of None stands for a default and is within every bound."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_ONE = Bound(lambda x: x >= 1, "at least 1")
ALL_AT_LEAST_ONE = Bound(lambda sizes: all(x >= 1 for x in sizes), "sizes of at least 1")
ABOVE_ZERO = Bound(lambda x: 0 < x < math.inf, "a finite number above 0")
AT_LEAST_ZERO = Bound(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
NAME = Bound(lambda x: bool(re.fullmatch(r"[\w.-]+", x)), "letters, digits, '.', '_' and '-' only")
SHORT = Bound(lambda x: len(x.encode()) <= 100, "at most 100 bytes long")  # a file's name has at most 255
FRACTION = Bound(lambda x: 0 <= x <= 1, "between 0 and 1")


@dataclass
class CommonArgs:
    """The arguments that all three scripts share."""

    # How long is trained, and what is left behind
    preset: Annotated[str | None, tyro.conf.arg(metavar=f"{{{','.join(sorted(PRESETS))}}}")] = None
    """Flags tuned for an environment and one process (rl/presets.py); what else is given wins."""
    total_timesteps: Annotated[int, AT_LEAST_ONE] = 98_304
    """Environment steps in the whole run, over all environments of all processes."""
    seed: Annotated[int, Bound(lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1")] = 42
    """Every random number of the run derives from it."""
    exp_name: Annotated[str, NAME, SHORT] = "ppo"
    """Name of the experiment, part of the name of the run's folder."""
    capture_video: bool = False
    """Record episodes into train_videos/ and test_videos/ inside the run's folder."""
    test_episodes: Annotated[int, AT_LEAST_ONE] = 10
    """Greedy episodes after training; their mean return is logged."""
    max_test_steps: Annotated[int, AT_LEAST_ONE] = 27_000
    """Steps after which a test episode that has not ended is cut."""
    checkpoint_every: Annotated[int, AT_LEAST_ONE] = 1
    """Write a checkpoint after every N-th update. The end of the run writes one in any case."""
    keep_checkpoints: Annotated[int, AT_LEAST_ONE] = 2
    """Keep the N newest checkpoints in the run's folder and delete the older ones."""
    resume: Annotated[str | None, Bound(bool, "a run's folder or one of its checkpoints")] = None
    """Go on with a run: its folder, or one of its checkpoints. The other flags are those of the run."""
    timeout: Annotated[float, Bound(lambda x: 0 < x <= 1e6, "above 0 and at most 1e6")] = 60.0
    """Seconds that a process waits for another before the run ends; more than a rollout takes."""

    # Which environment, and how it is run
    env_id: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment, as key=value pairs or JSON: gravity=-5 or '{"gravity": -5}'."""
    env_backend: Literal["gymnasium", "envpool"] = "gymnasium"
    """Who runs the environments of the training; EnvPool is faster for those it has (requirements-envpool.txt)."""
    env_threads: Annotated[int, AT_LEAST_ONE] = 1
    """Threads in which EnvPool steps the environments of a process."""
    num_envs: Annotated[int, AT_LEAST_ONE] = 4
    """Environments of each process that runs environments."""
    normalize_observations: bool = False
    """Shift and scale observations by their mean and variance so far, over all ranks; images stay as they are."""
    normalize_rewards: bool = False
    """Divide rewards by the standard deviation of the discounted return so far, over all ranks."""

    # How much experience an update takes, and how it is cut into minibatches
    num_steps: Annotated[int, AT_LEAST_ONE] = 1024
    """Environment steps gathered before each update, over all environments of all processes."""
    per_rank_batch_size: Annotated[int, AT_LEAST_ONE] = 64
    """Rows of a minibatch, for each process that optimizes and each gradient step."""
    update_epochs: Annotated[int, AT_LEAST_ONE] = 10
    """Passes over the gathered data in each update."""
    share_data: bool = False
    """Every process that optimizes receives all data and trains on a part drawn anew in each epoch."""
    compile: Annotated[bool | None, tyro.conf.arg(metavar="| --no-compile")] = None
    """Compile the gradient step, several times faster after some seconds; by default if the run is long enough."""

    # The networks of the policy and of the value function
    hidden_sizes: Annotated[tuple[int, ...], Bound(lambda sizes: all(x >= 1 for x in sizes), "sizes of at least 1")] = (
        64,
        64,
    )
    """Units of each hidden layer."""
    activation_function: Literal["relu", "tanh"] = "relu"
    """Activation of the hidden layers."""
    ortho_init: bool = False
    """Initialise the layers orthogonally instead of with PyTorch's defaults."""

    # Proximal Policy Optimization (Schulman et al. 2017)
    learning_rate: Annotated[float, ABOVE_ZERO] = 1e-3
    """Learning rate of Adam."""
    anneal_lr: bool = True
    """Lower the learning rate linearly, to zero at the end of the run."""
    gamma: Annotated[float, FRACTION] = 0.999
    """Discount factor of the rewards."""
    gae_lambda: Annotated[float, FRACTION] = 0.98
    """Lambda of generalized advantage estimation: 0 trusts the value function, 1 the returns."""
    clip_coef: Annotated[float, ABOVE_ZERO] = 0.2
    """Epsilon of the surrogate objective: how far the probability ratio may leave 1."""
    clip_vloss: bool = False
    """Use the larger of the clipped and the unclipped squared error of the values."""
    ent_coef: Annotated[float, AT_LEAST_ZERO] = 0.0
    """Weight of the entropy bonus in the loss."""
    vf_coef: Annotated[float, AT_LEAST_ZERO] = 0.5
    """Weight of the value loss in the loss."""
    max_grad_norm: Annotated[float, ABOVE_ZERO] = 0.5
    """Norm to which larger gradients are clipped."""
    normalize_advantages: bool = True
    """Normalise the advantages of each update over all ranks."""
    target_kl: Annotated[float | None, ABOVE_ZERO] = None
    """End an update after the epoch in which the approximate KL divergence, over all ranks, exceeds this."""
    noise_correlation: Annotated[float, Bound(lambda x: 0 <= x < 1, "at least 0 and below 1")] = 0.0
    """Correlation of a continuous action's noise with that of the step before: noise that lasts explores further."""

    log_root: ClassVar[Path]

    def check(self) -> None:
        """Check the bounds of every flag.

        Raises:
            ValueError: with one line that names the flag, its bounds and the value.
        """
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            for bound in getattr(kind, "__metadata__", ()):
                value = getattr(self, name)
                if isinstance(bound, Bound) and value is not None and not bound.holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {bound.words}, got {value!r}")
        self.env_arguments()
        if self.capture_video and self.env_backend == "envpool":
            raise ValueError("--capture-video goes with --env-backend gymnasium: EnvPool draws no pictures")
        if self.env_threads > 1 and self.env_backend == "gymnasium":
            raise ValueError(
                "--env-threads goes with --env-backend envpool: Gymnasium's environments step in one thread"
            )

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
        """Return about what policy and value function take: weights, gradients and Adam's two moments, in float32.

        Args:
            num_features: of an observation, as the first layer sees it.
        """
        weights = sum((inputs + 1) * outputs for inputs, outputs in pairwise((num_features, *self.hidden_sizes)))
        return 2 * weights * 4 * 4

    def rollout_length(self, world_size: int) -> int:
        """Return T, the steps that each environment takes before an update."""
        return math.ceil(self.num_steps / (self.num_envs * self.env_processes(world_size)))

    def steps_per_update(self, world_size: int) -> int:
        """Return the environment steps of an update: `num_steps`, rounded up to what the environments share evenly."""
        return self.rollout_length(world_size) * self.num_envs * self.env_processes(world_size)

    @property
    def num_updates(self) -> int:
        """The number of updates of the run: it follows from the flags alone, whatever the number of processes."""
        return self.total_timesteps // self.num_steps

    def minibatches_per_epoch(self, num_rows: int, world_size: int) -> int:
        """Return how many gradient steps `world_size` processes, which share `num_rows` rows, take in an epoch."""
        return math.ceil(math.ceil(num_rows / world_size) / self.per_rank_batch_size)

    def compiles(self, num_rows: int, world_size: int) -> bool:
        """Return whether the gradient step is compiled: if that saves more time than it takes, or as a flag says.

        Args:
            num_rows: rows of an update, over all processes that optimize.
            world_size: the number of these processes.
        """
        if self.compile is not None:
            return self.compile
        steps = self.num_updates * self.update_epochs * self.minibatches_per_epoch(num_rows, world_size)
        if world_size == 1:
            return steps * SAVED_ALONE > COMPILING_ALONE
        return steps * SAVED_TOGETHER > COMPILING_TOGETHER

    def learning_rate_at(self, update: int) -> float:
        """Return the learning rate of an update, counted from 1."""
        return self.learning_rate * (1 - (update - 1) / self.num_updates) if self.anneal_lr else self.learning_rate


@dataclass
class TorchArgs(CommonArgs):
    """PPO in raw PyTorch with DistributedDataParallel."""

    cuda: bool = False
    """Train on GPUs."""

    log_root: ClassVar[Path] = Path("logs/torch_logs")


@dataclass
class FabricArgs(CommonArgs):
    """PPO with Lightning Fabric; `fabric run` takes the devices, the accelerator and the strategy."""

    log_root: ClassVar[Path] = Path("logs/fabric_logs")

    def check_processes(self, world_size: int) -> None:
        """Check what depends on the number of processes.

        Raises:
            ValueError: with one line that says what does not fit.
        """
        if world_size > 1 and "LT_CLI_USED" not in os.environ:
            raise ValueError("several processes of train_fabric.py are started with `fabric run`, see README.md")
        _check_precision()
        strategy, accelerator = os.environ.get("LT_STRATEGY", "auto"), os.environ.get("LT_ACCELERATOR", "cpu")
        if strategy not in STRATEGIES:
            raise ValueError(f"--strategy={strategy} is not supported: train_fabric.py runs with --strategy=ddp")
        if accelerator in ("gpu", "cuda"):
            from torch import cuda  # here, so that only a run on a GPU waits for torch before its flags are checked

            if not cuda.is_available():
                raise ValueError(
                    f"--accelerator={accelerator} needs a GPU, and PyTorch sees none: choose --accelerator=cpu"
                )
        super().check_processes(world_size)


@dataclass
class DecoupledArgs(CommonArgs):
    """PPO with Lightning Fabric, one player that runs the environments and N trainers that optimize."""

    cuda: bool = False
    """Train on GPUs."""
    player_on_gpu: bool = False
    """Let the player act on a GPU too (with --cuda)."""
    overlap: bool = False
    """Collect the next rollout while the trainers optimize, with weights that are one update old."""

    log_root: ClassVar[Path] = Path("logs/fabric_decoupled_logs")

    def check(self) -> None:
        """Check the bounds of every flag.

        Raises:
            ValueError: with one line that names the flag, its bounds and the value.
        """
        super().check()
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
        _check_precision()
        super().check_processes(world_size)
        if (trainers := world_size - 1) > (steps := self.steps_per_update(world_size)):
            raise ValueError(f"{trainers} trainers cannot share {steps} experiences: raise --num-steps")

    def env_processes(self, world_size: int) -> int:
        """Return how many processes run environments: the player alone."""
        return 1


def _check_precision() -> None:
    """Check the precision that `fabric run` was given; the scripts compute in float32 alone.

    Raises:
        ValueError: with one line, if it is another.
    """
    if (precision := os.environ.get("LT_PRECISION", "32-true")) not in ("32", "32-true"):
        raise ValueError(f"--precision={precision} is not supported: the scripts train in --precision=32-true")


def _json_or_text(value: str) -> Any:
    """Return what `value` means in JSON or, for True, False and None, in Python, else `value` itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return value
