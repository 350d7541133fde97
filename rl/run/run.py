"""The paperwork of a run, the same in all scripts: its folder, progress, checkpoints, means, resume and test."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rl.args import CommonArgs
from rl.environments.collector import Collector
from rl.environments.evaluation import evaluate
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch, Episodes
from rl.ppo.distributions import DiagonalGaussian
from rl.ppo.metrics import name_means, sum_episodes
from rl.ppo.minibatches import almost_equal_sizes
from rl.processes.gather import gather_bytes
from rl.processes.placement import compute_in_float32, keep_to_own_cores
from rl.run.checkpoints import Checkpoints
from rl.run.ending import ending
from rl.run.folder import choose_run_folder
from rl.run.progress import Progress
from rl.run.resuming import restore_environments, restore_learner, shared_checkpoint
from rl.seeding import Purpose
from rl.voice import going_on_without, say, say_first

FAR = 0.2  # an approximate KL divergence of which a line warns: updates of runs that learn hardly exceed 0.1


class Closable(Protocol):
    """What is open until the run ends."""

    def close(self) -> None:
        """Close it."""


Open = TypeVar("Open", bound=Closable)


class Run:
    """What a process needs to know of the run it takes part in; rank 0 alone writes and speaks.

    Make it once all process groups exist.

    Args:
        args: of the run.
        rank: of this process.
        world_size: number of processes.
        sum_over_ranks: adds up a tensor over all processes.
    """

    def __init__(
        self,
        args: CommonArgs,
        rank: int,
        world_size: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        if dist.is_initialized():
            # Fabric's process group would wait for half an hour.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=args.timeout))
        keep_to_own_cores()
        compute_in_float32()
        self.args, self.rank, self.world_size, self.is_first = args, rank, world_size, rank == 0
        self.sum_over_ranks = sum_over_ranks
        self.checkpoint = shared_checkpoint(args)
        self.updates_done: int = self.checkpoint["update"] if self.checkpoint else 0
        self.steps = args.steps_per_update(world_size)  # of all environments together
        self.folder = choose_run_folder(args)
        if self.is_first:
            with going_on_without("args.json"):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "args.json").write_text(json.dumps(vars(args), indent=2))
        self.train_videos = self.folder / "train_videos" if args.capture_video and self.is_first else None
        gather = gather_bytes if args.env_processes(world_size) > 1 else None
        self.checkpoints = Checkpoints(self.folder, args, gather, self.updates_done)
        self.progress = self.closing(Progress(args, self.steps, self.is_first, self.updates_done))
        self.scalars: dict[str, float] = self.checkpoint["scalars"] if self.checkpoint else {}
        self.is_best = False  # of the agent: whether its last evaluation is the best so far
        self.best_return: float | None = self.checkpoint["best_return"] if self.checkpoint else None
        self.clock = time.perf_counter()

    @property
    def purge_step(self) -> int:
        """The environment step from which on the log of a run that is resumed is written anew."""
        return self.updates_done * self.steps + 1

    def closing(self, thing: Open) -> Open:
        """Return what it is given, and close that however the run ends."""
        ending.closing.callback(thing.close)
        return thing

    def restore(
        self,
        agent: Agent,
        optimizer: Optimizer,
        collector: Collector | None = None,
        gradient_step: Callable[[Batch, float], object] | None = None,
    ) -> None:
        """Put agent, optimizer and environments back to where the checkpoint found them, if the run goes on from one.

        Args:
            agent: the plain one.
            optimizer: of its parameters.
            collector: of a process that runs environments.
            gradient_step: of a process that takes gradient steps.
        """
        if not self.checkpoint:
            return
        if gradient_step:
            # One step before all others, which is then undone: after it DistributedDataParallel orders the gradients
            # anew, and the last bit of a sum over three ranks depends on their order.
            gradient_step(Batch.zeros(1, agent), 1.0)
        restore_learner(self.checkpoint, agent, optimizer)
        if collector:
            restore_environments(self.checkpoint, collector)

    @property
    def acting_weights(self) -> Tensor | None:
        """Of a run with --overlap that is resumed: the weights that act in its next rollout, [P]."""
        return self.checkpoint["acting_weights"] if self.checkpoint else None

    def updates(self) -> Iterator[int]:
        """Count the updates that are to be done, from 1, until all are done or an evaluation reaches `--stop-at`.

        The first begins when all processes are ready for it.
        """
        if ending.peers is not None:
            ending.peers.wait_until_all_are_ready()
        gc.freeze()
        gc.enable()
        self.clock = time.perf_counter()
        while self.updates_done < self.args.num_updates and not self.is_solved:
            ending.update = self.updates_done + 1
            yield ending.update
            self.updates_done = ending.update

    def means(self, update: int, agent: Agent, optimizer: Optimizer, sums: Tensor) -> dict[str, float]:
        """Return what is logged of an update. Where no episode ended, the last mean return stands.

        Args:
            update: its number.
            agent: the plain one, after the update.
            optimizer: with the learning rate of the update.
            sums: over all ranks, see `sum_up`.

        Raises:
            RunError: if a loss is NaN or infinite.
        """
        self.scalars |= name_means(sums)
        self.scalars["Info/learning_rate"] = optimizer.param_groups[0]["lr"]
        self.clock, before = time.perf_counter(), self.clock
        self.scalars["Time/step_per_second"] = self.steps / (self.clock - before)
        if isinstance(agent.distribution, DiagonalGaussian):
            self.scalars["Info/policy_std"] = agent.distribution.log_std.exp().mean().item()
        if self.is_first and (divergence := self.scalars["Info/approx_kl"]) > FAR:
            far = f"the policy moved far in update {update}, by an approximate KL divergence of {divergence:.2g}"
            say_first("far", f"{far}: a lower --learning-rate, or --target-kl, keeps it closer")
        return self.scalars

    @contextmanager
    def writing_log(self) -> Iterator[None]:
        """Go on where the disk does not take the log; a signal waits until it is written."""
        with ending.signals_waiting(), going_on_without("the log"):
            yield

    def evaluate(self, update: int, agent: Agent) -> dict[str, float]:
        """Return mean return and mean length of greedy episodes, if it is time to evaluate the agent, else nothing.

        The episodes have random streams of their own, so training goes on as if there had been no evaluation. Each
        process that runs environments plays a share of them, and all hear the sums, so that all decide alike whether
        to stop. Call it on all processes.

        Args:
            update: its number.
            agent: the plain one, after the update.
        """
        self.is_best = False
        args = self.args
        if not args.evaluates_after(update):
            return {}
        before = time.perf_counter()
        players = args.env_processes(self.world_size)
        shares = almost_equal_sizes(args.eval_episodes, players) + [0] * (self.world_size - players)
        share, first = shares[self.rank], sum(shares[: self.rank])
        returns, lengths = evaluate(agent, args, share, args.seed, purpose=Purpose.EVALUATION, first=first)
        sums = sum_episodes(Episodes(returns.tolist(), lengths.tolist())).to(next(agent.parameters()).device)
        return_sum, length_sum, episodes = self.sum_over_ranks(sums).tolist()
        mean = return_sum / episodes
        self.is_best = self.best_return is None or mean > self.best_return
        if self.is_best:
            self.best_return = mean
        self.clock += time.perf_counter() - before  # it does not count as the next update's
        return {"Eval/return": mean, "Eval/length": length_sum / episodes}

    @property
    def is_solved(self) -> bool:
        """Whether an evaluation has reached `--stop-at`."""
        return self.args.is_solved_by(self.best_return)

    def end_update(
        self,
        update: int,
        agent: Agent,
        optimizer: Optimizer,
        collector: Collector,
        acting_weights: Tensor | None = None,
    ) -> None:
        """Show the progress, and write a checkpoint when it is time to; call it on all processes with environments.

        Args:
            update: its number.
            agent: the plain one.
            optimizer: of its parameters.
            collector: of this process.
            acting_weights: those that act in the next rollout, where they are not the agent's, [P].
        """
        with ending.signals_waiting():
            self.progress.show(update, self.scalars, self.best_return)
        self.checkpoints.add(
            update,
            agent.state_dict(),
            optimizer,
            self.scalars,
            collector,
            acting_weights,
            self.best_return,
            self.is_best,
        )

    def test(self, agent: Agent) -> dict[str, float]:
        """Return the mean return of greedy episodes, by the name it is logged under; the first process runs them."""
        self.progress.close()
        if not self.is_first:
            return {}
        args = self.args
        if self.is_solved:
            say(f"an evaluation reached --stop-at {args.stop_at:g} after update {self.updates_done}")
        videos = self.folder / "test_videos" if args.capture_video else None
        mean = float(evaluate(agent, args, args.test_episodes, args.seed, video_folder=videos).returns.mean())
        print(f"mean return of {args.test_episodes} test episodes: {mean:.1f}, run: {self.folder}")
        return {"Test/cumulative_reward": mean}
