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

import os
import time

import torch
from lightning import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch import Tensor

from rl.environments.making import make_envs, read_spaces, record_training, reset_envs
from rl.environments.rollout import collect_rollout
from rl.evaluate import evaluate
from rl.fast.gradient_step import compile_gradient_step
from rl.ppo.batch import Batch
from rl.ppo.distributions import draw_action_noise
from rl.ppo.gae import generalized_advantage_estimation
from rl.ppo.lightning_agent import LightningAgent
from rl.ppo.loss import Losses
from rl.ppo.minibatches import minibatch_sizes, minibatches
from rl.ppo.normalize import moments, normalize_advantages
from rl.processes.agreement import check_agreement, weights_checksum
from rl.processes.peers import join
from rl.processes.placement import keep_to_own_cores, place
from rl.processes.ranks import read_ranks
from rl.run.checkpoints import Checkpoints, restore, shared_checkpoint
from rl.run.ending import at_end, give_up, run, updates
from rl.run.folder import choose_run_folder, hyperparameter_table
from rl.run.metrics import name_means, sum_episodes, sum_losses
from rl.run.progress import Progress
from rl.seeding import Purpose, stream_seed


def main(args: FabricArgs) -> None:
    """Train an agent, then test it."""
    # Launch: fabric run tells each process its rank. One thread each, on its own cores, so that none is in the way.
    torch.set_num_threads(1)
    ranks = read_ranks()
    rank, world_size = ranks.rank, ranks.world_size
    accelerator, devices = os.environ.get("LT_ACCELERATOR", "cpu"), os.environ.get("LT_DEVICES", 1)
    device, backend = place(accelerator != "cpu" and torch.cuda.is_available(), ranks)
    join(ranks, backend, args.timeout, device)
    keep_to_own_cores(ranks)

    # Checkpoint to go on from, if any
    checkpoint = shared_checkpoint(args, device)
    done = checkpoint["update"] if checkpoint else 0
    steps = args.steps_per_update(world_size)  # of all environments together

    # Log: only rank 0 writes.
    run_folder = choose_run_folder(args)
    logger = TensorBoardLogger(run_folder.parent, run_folder.name, version="", purge_step=done * steps)
    if rank == 0:
        at_end(lambda: logger.finalize("success"))
        logger.experiment.add_text("hyperparameters", hyperparameter_table(args))
    progress = Progress(args, steps, enabled=rank == 0, done=done)
    fabric = Fabric(accelerator=accelerator, devices=devices, loggers=logger)

    def log(scalars: dict[str, float], update: int) -> None:
        with give_up("the log"):
            fabric.log_dict(scalars, update * steps)
            logger.save()

    # Exchange: sums over all ranks, and the rows of all ranks one after the other.
    def sum_over_ranks(tensor: Tensor) -> Tensor:
        return fabric.all_reduce(tensor, reduce_op="sum")

    def gather(rows: Tensor) -> Tensor:
        return fabric.all_gather(rows).reshape(-1, *rows.shape[1:])

    # Agent: the plain one acts, is tested and saved; the wrapped one only takes gradient steps.
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    observation_space, action_space = read_spaces(args)
    agent = LightningAgent(observation_space, action_space, args)

    # Optimizer
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    fabric_agent, optimizer = fabric.setup(agent, optimizer)

    # Environments: all different, over ranks and within a rank. The first of all is recorded.
    env_indices = range(rank * args.num_envs, (rank + 1) * args.num_envs)
    record = record_training(run_folder / "train_videos") if args.capture_video and rank == 0 else None
    envs = make_envs(args, args.num_envs, record)
    at_end(envs.close)
    observations = reset_envs(envs, args.seed, env_indices[0])
    checkpoints = Checkpoints(run_folder, args, envs, gather if world_size > 1 else None, done)

    # Resume: agent, optimizer and environments go back to where the checkpoint found them.
    scalars: dict[str, float] = {}
    if checkpoint:
        # One backward pass before all others: after it DistributedDataParallel orders the gradients anew, and the last
        # bit of a sum over three ranks depends on their order.
        row = Batch.zeros(1, observation_space, agent.distribution).to(fabric.device)
        fabric.backward(fabric_agent.training_step(row, 1).loss)
        observations = restore(checkpoint, agent, optimizer, envs, env_indices[0])
        scalars = checkpoint["scalars"]
        log(scalars, done)  # from here on the log is written anew

    # Gradient step: the backward pass averages the gradients over all ranks, so all take the same step.
    def gradient_step(minibatch: Batch, mean_rows: float) -> Tensor:
        losses = fabric_agent.training_step(minibatch, mean_rows)
        optimizer.zero_grad()
        fabric.backward(losses.loss)
        fabric.clip_gradients(fabric_agent, optimizer, max_norm=args.max_grad_norm)
        optimizer.step()
        return torch.stack(losses).detach()

    # A compiled graph stands in for it in a long run. It proves at once, and now and then, that it does the same; what
    # is shown above is called for the proof alone, unless the proof fails.
    if args.compiles(steps, world_size):
        sizes = {ranks[rank] for ranks in minibatch_sizes(steps, args, world_size)}
        examples = [Batch.zeros(size, observation_space, agent.distribution).to(device) for size in sorted(sizes)]
        gradient_step = compile_gradient_step(
            gradient_step, agent, optimizer, args, examples, sum_over_ranks, world_size
        )

    # Loop over updates
    start = time.perf_counter()
    for update in updates(done, args.num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)

        # Rollout: T steps in each environment.
        noise = draw_action_noise(
            agent.distribution, args.rollout_length(world_size), env_indices, args.seed, update, args.noise_correlation
        )
        rollout, observations, episodes = collect_rollout(agent, envs, observations, noise)
        envs.mark(update)

        # Normalise: statistics over all ranks; those of the observations count from the next rollout on.
        if args.normalize_observations:
            agent.observation_normalizer.update(sum_over_ranks(moments(rollout.raw_observations)))
        if args.normalize_rewards:
            sums = sum_over_ranks(agent.reward_normalizer.new_moments(rollout.rewards, rollout.dones))
            agent.reward_normalizer.update(sums)
        rewards = agent.reward_normalizer(rollout.rewards)

        # Advantages, normalised over all ranks
        advantages = generalized_advantage_estimation(
            rewards, rollout.values, rollout.next_values, rollout.dones, args.gamma, args.gae_lambda
        )
        returns = advantages + rollout.values
        if args.normalize_advantages:
            advantages = normalize_advantages(advantages, sum_over_ranks(moments(advantages)))
        batch = Batch.from_rollout(rollout, advantages, returns)

        # Share: every rank receives the rows of all ranks.
        if args.share_data:
            batch = batch.unpack(gather(batch.pack()))

        # Optimize
        losses = []
        for epoch in range(args.update_epochs):
            for minibatch, mean_rows in minibatches(batch, steps, args, update, epoch, rank, world_size):
                losses.append(gradient_step(minibatch, mean_rows))
            if args.target_kl is not None:
                kl = sum_over_ranks(Losses(*losses[-1]).approx_kl.clone())
                if kl / world_size > args.target_kl:
                    break

        # Guard: all ranks hold the same weights.
        if update in (done + 1, args.num_updates):
            check_agreement(gather(weights_checksum(agent)), update)

        # Log: means over all ranks. Where no episode ended, the last mean return stands.
        sums = torch.cat([sum_episodes(episodes).to(fabric.device), sum_losses(losses)])
        scalars |= name_means(sum_over_ranks(sums))
        scalars["Info/learning_rate"] = args.learning_rate_at(update)
        start, before = time.perf_counter(), start
        scalars["Time/step_per_second"] = steps / (start - before)
        log(scalars, update)
        progress.show(update, scalars)

        # Checkpoint: what all ranks hold is the same but for their environments.
        checkpoints.add(update, agent.state_dict(), optimizer, scalars)

    # Test: greedy episodes.
    progress.close()
    if rank == 0:
        test_videos = run_folder / "test_videos" if args.capture_video else None
        results = evaluate(agent, args, args.test_episodes, args.seed, video_folder=test_videos)
        test_return = results.returns.mean()
        log({"Test/cumulative_reward": test_return}, args.num_updates)
        print(f"mean return of {args.test_episodes} test episodes: {test_return:.1f}, run: {run_folder}")


if __name__ == "__main__":
    run(main, args)
