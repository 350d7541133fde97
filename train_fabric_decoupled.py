"""PPO with Lightning Fabric, decoupled: one player runs the environments, N trainers optimize.

    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4                            # on the CPU
    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda                     # trainers on GPUs
    fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda --player-on-gpu     # all on GPUs
    fabric run --devices=3 train_fabric_decoupled.py -- --help                               # all flags

Player and trainers begin with the same weights and exchange three messages per update (rl/processes/channel.py):

    player (rank 0)                               trainers (ranks 1..N)
    rollout, advantages
              ---- 1. batch, a share each ----->  every trainer
                                                  update_epochs of gradient steps, averaged over the trainers
              <--- 2. losses -------------------  lead trainer (rank 1)
              <--- 3. weights, Adam's state ----  lead trainer
    log, checkpoint

With --overlap the player collects the next rollout between 1 and 2, with weights that are one update old, as HTS-RL
(arXiv 2012.09849) and Cleanba (arXiv 2310.00036) do. Both sides derive the number of updates from the same arguments;
with --stop-at all hear the mean return of each evaluation, and stop after the same one.
"""

from rl.args import DecoupledArgs
from rl.run.command_line import parse

if __name__ == "__main__":
    args = parse(DecoupledArgs)  # before the slow imports, so that --help and mistakes are answered at once

import os

import torch
from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from rl.environments.collector import Collector
from rl.environments.making import read_spaces
from rl.fast.gradient_step import compile_gradient_step
from rl.fast.shared_memory import use_shared_memory
from rl.ppo.agent import copy_weights
from rl.ppo.batch import Batch
from rl.ppo.lightning_agent import LightningAgent
from rl.ppo.loss import Losses
from rl.ppo.metrics import sum_experience, sum_losses
from rl.ppo.minibatches import minibatches
from rl.ppo.prepare import prepare_batch
from rl.processes.channel import PLAYER, Channel
from rl.processes.placement import choose_device
from rl.run.ending import start
from rl.run.lightning_loggers import open_lightning_loggers
from rl.run.run import Run
from rl.seeding import Purpose, stream_seed


def main(args: DecoupledArgs) -> None:
    """Launch: every process takes its place, then its part."""
    # The script chooses the devices, so what `fabric run` would choose is set aside; torchrun then works as well.
    for name in ("LT_CLI_USED", "LT_ACCELERATOR", "LT_DEVICES", "LT_NUM_NODES", "LT_STRATEGY"):
        os.environ.pop(name, None)
    use_shared_memory()  # two processes of one host sum without messages
    device, backend = choose_device(args.cuda, apart=1, apart_on_gpu=args.player_on_gpu)
    channel = Channel(args, backend)
    (player if channel.rank == PLAYER else trainer)(args, channel, device)


def player(args: DecoupledArgs, channel: Channel, device: torch.device) -> None:
    """Run the environments, send what they gave to the trainers, log, and test at the end."""
    # Log
    run = Run(args, channel.rank, channel.world_size, channel.everyone.all_reduce)
    loggers = open_lightning_loggers(run)
    fabric = Fabric(accelerator=device.type, strategy=SingleDeviceStrategy(device), loggers=loggers)

    def log(scalars: dict[str, float], update: int) -> None:
        with run.writing_log():
            fabric.log_dict(scalars, update * run.steps)
            for logger in loggers:
                logger.save()

    # Environments
    collector = run.closing(Collector(args, channel.rank, channel.world_size, run.train_videos))

    # Agent: it only acts here, with the weights that arrive. Its optimizer only receives the state to save.
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    agent = LightningAgent(collector.observation_space, collector.action_space, args).to(fabric.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    # Resume: with --overlap the rollout that had begun is collected again, with the weights that acted in it.
    run.restore(agent, optimizer, collector)
    ahead = None
    if run.acting_weights is not None and run.updates_done < args.num_updates:
        weights = parameters_to_vector(agent.parameters())
        copy_weights(run.acting_weights, agent)
        ahead = collector.collect(agent, run.updates_done + 1)
        copy_weights(weights, agent)

    # Loop over updates
    for update in run.updates():
        # Rollout: T steps in each environment, unless it was collected ahead; then the advantages.
        rollout, episodes = ahead or collector.collect(agent, update)
        batch = prepare_batch(rollout, agent, args)
        ahead = None
        del rollout  # the messages and the next rollout need the memory

        # Message 1: all rows to every trainer, or a random part to each.
        channel.send_batch(batch, update)
        experience = sum_experience(episodes, batch)
        del batch

        # Overlap: collect the next rollout while the trainers optimize on this one.
        acting_weights = parameters_to_vector(agent.parameters()).detach() if args.overlap else None
        ahead = collector.collect(agent, update + 1) if args.overlap and update < args.num_updates else None

        # Messages 2 and 3: the losses; the new weights, and the optimizer's state for the checkpoint.
        sums = torch.cat([experience.cpu(), channel.receive_losses()])
        channel.receive_state(agent, optimizer)
        channel.check_weights(agent, update)
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)

        # Log, evaluate and checkpoint: the trainers hear the mean return, so all decide alike whether the run goes on.
        staleness = {"Info/staleness": int(update > 1)} if args.overlap else {}  # updates that the policy was behind
        log(run.means(update, agent, optimizer, sums) | staleness | run.evaluate(update, agent), update)
        run.end_update(update, agent, optimizer, collector, acting_weights)

    # Test: greedy episodes.
    log(run.test(agent), run.updates_done)


def trainer(args: DecoupledArgs, channel: Channel, device: torch.device) -> None:
    """Optimize on what the player sends, together with the other trainers."""
    # Launch: Fabric joins the trainers among themselves.
    run = Run(args, channel.rank, channel.world_size, channel.everyone.all_reduce)
    rank, num_trainers = channel.rank - 1, channel.num_trainers
    strategy: Strategy = SingleDeviceStrategy(device)
    if num_trainers > 1:
        devices = [device] * channel.world_size  # one for each process, on any machine; Fabric takes its own
        strategy = DDPStrategy(parallel_devices=devices, process_group=channel.trainers.group)
    fabric = Fabric(accelerator=device.type, strategy=strategy)
    fabric.launch()

    # Agent: the plain one is sent to the player; the wrapped one only takes gradient steps.
    torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
    agent = LightningAgent(*read_spaces(args), args)

    # Optimizer
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    fabric_agent, optimizer = fabric.setup(agent, optimizer)

    # Gradient step: the backward pass averages the gradients over the trainers, so all take the same step.
    def gradient_step(minibatch: Batch, mean_rows: float) -> Tensor:
        losses = fabric_agent.training_step(minibatch, mean_rows)
        optimizer.zero_grad()
        fabric.backward(losses.loss)
        fabric.clip_gradients(fabric_agent, optimizer, max_norm=args.max_grad_norm)
        optimizer.step()
        return torch.stack(losses).detach()

    # Resume: agent and optimizer go back to where a checkpoint found them.
    run.restore(agent, optimizer, gradient_step=gradient_step)

    # Compile: in a long run C++ or one graph stands in for the step above. From here on the wrapped agent, the backward
    # pass, clipping and the optimizer run only when that proves itself against them, or if it cannot.
    gradient_step = compile_gradient_step(gradient_step, agent, optimizer, args, run.steps, channel.trainers.group)

    # Loop over updates
    for update in run.updates():
        optimizer.param_groups[0]["lr"] = args.learning_rate_at(update)

        # Message 1: all rows, or this trainer's part.
        batch = channel.receive_batch(Batch.zeros(0, agent))

        # Optimize
        losses = []
        for epoch in range(args.update_epochs):
            for minibatch, mean_rows in minibatches(batch, run.steps, args, update, epoch, rank, num_trainers):
                losses.append(gradient_step(minibatch, mean_rows))
            kl = Losses(*losses[-1]).approx_kl.clone()
            if args.target_kl and channel.trainers.all_reduce(kl) / num_trainers > args.target_kl:
                break

        # Messages 2 and 3: the losses; the new weights and the optimizer's state. Then the player evaluates.
        channel.send_losses(sum_losses(losses))
        channel.send_state(agent, optimizer)
        channel.check_weights(agent, update)
        run.evaluate(update, agent)


if __name__ == "__main__":
    start(main, args)
