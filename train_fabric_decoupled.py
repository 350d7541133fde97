"""PPO with Lightning Fabric, decoupled: one player runs the environments, N trainers optimize.

    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4                            # on the CPU
    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda                     # trainers on GPUs
    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda --player-on-gpu     # all on GPUs
    fabric run --devices=3 train_fabric_decoupled.py -- --help                               # all flags

The processes exchange three messages per update (see rl/processes/channel.py):

    player (rank 0)                               trainers (ranks 1..N)
              <--- 1. weights ------------------  lead trainer (rank 1)
    rollout, advantages
              ---- 2. batch, a share each ----->  every trainer
                                                  update_epochs of gradient steps, averaged over the trainers
              <--- 3. losses -------------------  lead trainer
    log

The new weights and the optimizer's state follow, on the way of the weights, for the checkpoint. Both sides derive
the number of updates from the same arguments, so nothing needs to say stop.

So player and trainers take turns. With --overlap they work at the same time: once the player has sent a batch it
collects the next rollout, with weights that are one update old, and only then receives the losses.
"""

from rl.args import DecoupledArgs
from rl.run.command_line import parse

if __name__ == "__main__":
    args = parse(DecoupledArgs)  # before the slow imports, so that --help and mistakes are answered at once

import os
import time
from typing import NamedTuple

import torch
from lightning import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from rl.environments.making import make_envs, read_spaces, record_training, reset_envs
from rl.environments.rollout import collect_rollout
from rl.evaluate import evaluate
from rl.fast.gradient_step import compile_gradient_step
from rl.ppo.batch import Batch, Episodes
from rl.ppo.distributions import draw_action_noise
from rl.ppo.gae import generalized_advantage_estimation
from rl.ppo.lightning_agent import LightningAgent
from rl.ppo.loss import Losses
from rl.ppo.minibatches import minibatch_sizes, minibatches
from rl.ppo.normalize import moments, normalize_advantages
from rl.processes.channel import PLAYER, Channel, copy_weights
from rl.processes.peers import join
from rl.processes.placement import keep_to_own_cores, place
from rl.processes.ranks import Ranks, read_ranks
from rl.run.checkpoints import Checkpoints, restore, restore_learner, shared_checkpoint
from rl.run.ending import at_end, give_up, run, updates
from rl.run.folder import choose_run_folder, hyperparameter_table
from rl.run.metrics import LOSS_TAGS, name_means, sum_episodes, sum_losses
from rl.run.progress import Progress
from rl.seeding import Purpose, stream, stream_seed


class Collected(NamedTuple):
    """A rollout on its way to the trainers, and what the player's log and checkpoint will need to know about it."""

    rows: Tensor  # packed rows of experience, uint8 [B, bytes of a row]
    episodes: Episodes
    staleness: int  # updates that the policy that acted is behind the one that is optimised
    normalizers: dict[str, Tensor]  # their statistics after it


def main(args: DecoupledArgs) -> None:
    """Launch: every process takes its place, then its part."""
    # The device is ours to choose, so what `fabric run` would choose is set aside; torchrun then works as well.
    for name in ("LT_CLI_USED", "LT_ACCELERATOR", "LT_DEVICES", "LT_NUM_NODES", "LT_STRATEGY"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    ranks = read_ranks()
    device, backend = place(args.cuda, ranks, processes_on_cpu=0 if args.player_on_gpu else 1)
    join(ranks, "gloo", args.timeout)
    channel = Channel(ranks.rank, ranks.world_size, backend, args.timeout)
    keep_to_own_cores(ranks)
    if ranks.rank == PLAYER:
        player(args, channel, device, ranks)
    else:
        trainer(args, channel, device, ranks)


def player(args: DecoupledArgs, channel: Channel, device: torch.device, ranks: Ranks) -> None:
    """Run the environments, send what they gave to the trainers, log, and test at the end."""
    # Checkpoint to go on from, if any
    checkpoint = shared_checkpoint(args, torch.device("cpu"))
    done = checkpoint["update"] if checkpoint else 0
    steps = args.steps_per_update(ranks.world_size)  # of all environments together

    # Log
    run_folder = choose_run_folder(args)
    logger = TensorBoardLogger(run_folder.parent, run_folder.name, version="", purge_step=done * steps)
    fabric = Fabric(accelerator=device.type, strategy=SingleDeviceStrategy(device), loggers=logger)
    at_end(lambda: logger.finalize("success"))
    logger.experiment.add_text("hyperparameters", hyperparameter_table(args))
    progress = Progress(args, steps, enabled=True, done=done)

    def log(scalars: dict[str, float], update: int) -> None:
        with give_up("the log"):
            fabric.log_dict(scalars, update * steps)
            logger.save()

    # Environments
    record = record_training(run_folder / "train_videos") if args.capture_video else None
    envs = make_envs(args, args.num_envs, record)
    at_end(envs.close)
    observations = reset_envs(envs, args.seed, 0)
    checkpoints = Checkpoints(run_folder, args, envs, gather=None, done=done)

    # Agent: it only acts here, with the weights that arrive. Its optimizer only receives the state to save.
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    agent = LightningAgent(*read_spaces(args), args).to(fabric.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Resume: agent, optimizer and environments go back to where the checkpoint found them.
    scalars: dict[str, float] = {}
    held = done  # the update whose weights the agent holds
    if checkpoint:
        observations = restore(checkpoint, agent, optimizer, envs, 0)
        scalars = checkpoint["scalars"]
        log(scalars, done)  # from here on the log is written anew
        if args.overlap and done < args.num_updates:
            copy_weights(checkpoint["acting_weights"], agent)
            held = done - 1

    def collect(update: int) -> Collected:
        nonlocal observations

        # Rollout: T steps in each environment.
        noise = draw_action_noise(
            agent.distribution,
            args.rollout_length(ranks.world_size),
            range(args.num_envs),
            args.seed,
            update,
            args.noise_correlation,
        )
        rollout, observations, episodes = collect_rollout(agent, envs, observations, noise)
        envs.mark(update)

        # Normalise: the statistics of the observations count from the next rollout on.
        if args.normalize_observations:
            agent.observation_normalizer.update(moments(rollout.raw_observations))
        if args.normalize_rewards:
            agent.reward_normalizer.update(agent.reward_normalizer.new_moments(rollout.rewards, rollout.dones))
        rewards = agent.reward_normalizer(rollout.rewards)

        # Advantages, normalised over the whole batch
        advantages = generalized_advantage_estimation(
            rewards, rollout.values, rollout.next_values, rollout.dones, args.gamma, args.gae_lambda
        )
        returns = advantages + rollout.values
        if args.normalize_advantages:
            advantages = normalize_advantages(advantages, moments(advantages))
        rows = Batch.from_rollout(rollout, advantages, returns).pack()
        normalizers = {name: tensor.clone() for name, tensor in agent.state_dict().items() if "normalizer" in name}
        return Collected(rows, episodes, update - 1 - held, normalizers)

    # Loop over updates. With --overlap the next rollout is collected while the trainers optimize on this one.
    start = time.perf_counter()
    collected = collect(done + 1) if args.overlap and done < args.num_updates else None
    for update in updates(done, args.num_updates):
        channel.receive_weights(agent)
        held = update - 1
        if update == done + 2:
            channel.check_weights(agent, update - 1)
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)
        rows, episodes, staleness, normalizers = collected or collect(update)

        # Share: all rows to every trainer, or a random part to each.
        if not args.share_data:
            rows = rows[stream(args.seed, Purpose.SCATTER, update).permutation(len(rows))]
        channel.send_rows(rows, args.share_data)
        acting_weights = parameters_to_vector(agent.parameters()).detach() if args.overlap else None
        collected = collect(update + 1) if args.overlap and update < args.num_updates else None

        # Log: where no episode ended, the last mean return stands.
        losses = channel.receive_losses(len(LOSS_TAGS) + 1)
        scalars |= name_means(torch.cat([sum_episodes(episodes), losses]))
        scalars["Info/learning_rate"] = args.learning_rate_at(update)
        if args.overlap:
            scalars["Info/staleness"] = staleness
        start, before = time.perf_counter(), start
        scalars["Time/step_per_second"] = steps / (start - before)
        log(scalars, update)
        progress.show(update, scalars)

        # Checkpoint: the new weights and the optimizer's state arrive from the lead trainer.
        channel.receive_state(agent, optimizer)
        held = update
        checkpoints.add(update, agent.state_dict() | normalizers, optimizer, scalars, acting_weights)
    channel.check_weights(agent, args.num_updates)

    # Test: greedy episodes.
    progress.close()
    test_videos = run_folder / "test_videos" if args.capture_video else None
    results = evaluate(agent, args, args.test_episodes, args.seed, video_folder=test_videos)
    test_return = results.returns.mean()
    log({"Test/cumulative_reward": test_return}, args.num_updates)
    print(f"mean return of {args.test_episodes} test episodes: {test_return:.1f}, run: {run_folder}")


def trainer(args: DecoupledArgs, channel: Channel, device: torch.device, ranks: Ranks) -> None:
    """Optimize on what the player sends, together with the other trainers."""
    # Checkpoint to go on from, if any
    checkpoint = shared_checkpoint(args, torch.device("cpu"))
    done = checkpoint["update"] if checkpoint else 0
    steps = args.steps_per_update(ranks.world_size)

    # Launch: Fabric joins the trainers among themselves.
    rank, num_trainers = ranks.rank - 1, ranks.world_size - 1
    if num_trainers == 1:
        strategy = SingleDeviceStrategy(device)
    else:
        devices = [device] * ranks.world_size  # one for each process, on however many machines; Fabric takes its own
        strategy = DDPStrategy(parallel_devices=devices, process_group=channel.trainers.group)
    fabric = Fabric(accelerator=device.type, strategy=strategy)
    fabric.launch()

    # Agent: the plain one is sent to the player; the wrapped one only takes gradient steps.
    observation_space, action_space = read_spaces(args)
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    agent = LightningAgent(observation_space, action_space, args)
    template = Batch.zeros(0, observation_space, agent.distribution)

    # Optimizer
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    fabric_agent, optimizer = fabric.setup(agent, optimizer)

    # Resume
    if checkpoint:
        # One backward pass before all others: after it DistributedDataParallel orders the gradients anew, and the last
        # bit of a sum over three ranks depends on their order.
        row = Batch.zeros(1, observation_space, agent.distribution).to(fabric.device)
        fabric.backward(fabric_agent.training_step(row, 1).loss)
        restore_learner(checkpoint, agent, optimizer)

    # Gradient step: the backward pass averages the gradients over the trainers, so all take the same step.
    def gradient_step(minibatch: Batch, mean_rows: float) -> Tensor:
        losses = fabric_agent.training_step(minibatch, mean_rows)
        optimizer.zero_grad()
        fabric.backward(losses.loss)
        fabric.clip_gradients(fabric_agent, optimizer, max_norm=args.max_grad_norm)
        optimizer.step()
        return torch.stack(losses).detach()

    # A compiled graph stands in for it in a long run. It proves at once, and now and then, that it does the same; what
    # is shown above is called for the proof alone, unless the proof fails.
    if args.compiles(steps, num_trainers):
        sizes = {trainers[rank] for trainers in minibatch_sizes(steps, args, num_trainers)}
        examples = [Batch.zeros(size, observation_space, agent.distribution).to(device) for size in sorted(sizes)]
        gradient_step = compile_gradient_step(
            gradient_step, agent, optimizer, args, examples, channel.trainers.all_reduce, num_trainers
        )

    # Loop over updates
    for update in updates(done, args.num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)
        channel.send_weights(agent)
        if update == done + 2:
            channel.check_weights(agent, update - 1)

        # Share: what the player sent is all rows, or this trainer's part.
        rows = channel.receive_rows(steps, sum(template.field_bytes), args.share_data)
        batch = template.unpack(rows.to(fabric.device))

        # Optimize
        losses = []
        for epoch in range(args.update_epochs):
            for minibatch, mean_rows in minibatches(batch, steps, args, update, epoch, rank, num_trainers):
                losses.append(gradient_step(minibatch, mean_rows))
            if args.target_kl is not None:
                kl = channel.trainers.all_reduce(Losses(*losses[-1]).approx_kl.clone())
                if kl / num_trainers > args.target_kl:
                    break
        channel.send_losses(sum_losses(losses))

        # Checkpoint
        channel.send_state(agent, optimizer)
    channel.check_weights(agent, args.num_updates)


if __name__ == "__main__":
    run(main, args)
