"""PPO with Lightning Fabric: `fabric run` starts the processes, Fabric places and joins them.

    fabric run --accelerator=cpu --strategy=ddp --devices=2 train_fabric.py      # two processes
    python train_fabric.py                                                       # one process
    python train_fabric.py --help                                                # all flags

`diff train_torch.py train_fabric.py` shows what Lightning Fabric takes over.
"""

from rl.args import FabricArgs
from rl.run.command_line import parse

if __name__ == "__main__":
    args = parse(FabricArgs)  # before the slow imports, so that --help and mistakes are answered at once

import torch
from lightning import Fabric
from torch import Tensor

from rl.environments.collector import Collector
from rl.fast.gradient_step import compile_gradient_step
from rl.fast.shared_memory import use_shared_memory
from rl.ppo.batch import Batch
from rl.ppo.lightning_agent import LightningAgent
from rl.ppo.loss import Losses
from rl.ppo.metrics import sum_up
from rl.ppo.minibatches import minibatches
from rl.ppo.prepare import prepare_batch
from rl.processes.agreement import check_agreement, weights_checksum
from rl.run.ending import start
from rl.run.lightning_loggers import open_lightning_loggers
from rl.run.run import Run
from rl.seeding import Purpose, stream_seed


def main(args: FabricArgs) -> None:
    """Train an agent, then test it."""
    use_shared_memory()  # two processes of one host sum without messages
    # Launch: fabric run has given this process a rank. All ranks meet in one process group.
    fabric = Fabric()
    rank, world_size = fabric.global_rank, fabric.world_size

    # Exchange: sums over all ranks, and the rows of all ranks one after the other.
    def sum_over_ranks(tensor: Tensor) -> Tensor:
        return fabric.all_reduce(tensor, reduce_op="sum")

    def gather_rows(rows: Tensor) -> Tensor:
        return fabric.all_gather(rows).reshape(-1, *rows.shape[1:])

    # Log: only rank 0 writes, into the folder of the run.
    run = Run(args, rank, world_size, sum_over_ranks)
    fabric.loggers.extend(open_lightning_loggers(run))

    def log(scalars: dict[str, float], update: int) -> None:
        with run.writing_log():
            fabric.log_dict(scalars, update * run.steps)
            for logger in fabric.loggers:
                logger.save()

    # Environments: no two are alike, on any rank.
    collector = run.closing(Collector(args, rank, world_size, run.train_videos))

    # Agent: the plain one acts, is tested and saved; the wrapped one only takes gradient steps.
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    agent = LightningAgent(collector.observation_space, collector.action_space, args)

    # Optimizer
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    fabric_agent, optimizer = fabric.setup(agent, optimizer)

    # Gradient step: the backward pass averages the gradients over all ranks, so all take the same step.
    def gradient_step(minibatch: Batch, mean_rows: float) -> Tensor:
        losses = fabric_agent.training_step(minibatch, mean_rows)
        optimizer.zero_grad()
        fabric.backward(losses.loss)
        fabric.clip_gradients(fabric_agent, optimizer, max_norm=args.max_grad_norm)
        optimizer.step()
        return torch.stack(losses).detach()

    # Resume: agent, optimizer and environments go back to where a checkpoint found them.
    run.restore(agent, optimizer, collector, gradient_step)

    # Compile: in a long run C++ or one graph stands in for the step above. From here on the wrapped agent, the backward
    # pass, clipping and the optimizer run only when that proves itself against them, or if it cannot.
    gradient_step = compile_gradient_step(gradient_step, agent, optimizer, args, run.steps)

    # Loop over updates
    for update in run.updates():
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)

        # Rollout: T steps in each environment, then the advantages, with statistics over all ranks.
        rollout, episodes = collector.collect(agent, update)
        batch = prepare_batch(rollout, agent, args, sum_over_ranks)

        # Share: every rank receives the rows of all ranks.
        if args.share_data:
            batch = batch.unpack(gather_rows(batch.pack()))

        # Optimize
        losses = []
        for epoch in range(args.update_epochs):
            for minibatch, mean_rows in minibatches(batch, run.steps, args, update, epoch, rank, world_size):
                losses.append(gradient_step(minibatch, mean_rows))
            kl = Losses(*losses[-1]).approx_kl.clone()
            if args.target_kl and sum_over_ranks(kl) / world_size > args.target_kl:
                break

        # Guard: all ranks hold the same weights.
        check_agreement(sum_over_ranks(weights_checksum(agent)), world_size, update)

        # Log, evaluate and checkpoint: means over all ranks, so all decide alike whether the run goes on.
        sums = sum_over_ranks(sum_up(episodes, batch, losses))
        log(run.means(update, agent, optimizer, sums) | run.evaluate(update, agent), update)
        run.end_update(update, agent, optimizer, collector)
        del rollout, batch, minibatch  # the next rollout needs the memory

    # Test: greedy episodes.
    log(run.test(agent), run.updates_done)


if __name__ == "__main__":
    start(main, args)
