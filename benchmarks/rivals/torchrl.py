"""PPO made of TorchRL's components, in the order of its own examples.

Its fastest synchronous environments are Gymnasium's, which step together, in its wrapper.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files have the names of the libraries

import gymnasium as gym
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl._utils import compile_with_warmup
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, GymWrapper
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from benchmarks import rivals


def make_envs(args: Namespace) -> EnvBase:
    """Return the environments; TorchRL resets those that are done."""
    envs = gym.make_vec(
        args.env_id,
        num_envs=rivals.NUM_ENVS,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.DISABLED},
    )
    wrapped = GymWrapper(envs, categorical_action_encoding=True, device="cpu")
    wrapped.set_seed(args.seed)
    return wrapped


def make_networks(envs: EnvBase) -> tuple[ProbabilisticActor, ValueOperator]:
    """Return actor and critic, which share nothing."""

    def mlp(outputs: int) -> MLP:
        inputs = envs.observation_spec["observation"].shape[-1]
        return MLP(inputs, outputs, num_cells=rivals.HIDDEN_SIZES, activation_class=nn.Tanh)

    actor = ProbabilisticActor(
        TensorDictModule(mlp(envs.action_spec.space.n), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=envs.action_spec,
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        default_interaction_type=ExplorationType.RANDOM,
    )
    return actor, ValueOperator(mlp(1), in_keys=["observation"])


def main(args: Namespace) -> None:
    """Train."""
    report = rivals.Report()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    actor, critic = make_networks(envs)
    collector = Collector(
        envs,
        actor,
        frames_per_batch=rivals.STEPS_PER_UPDATE,
        total_frames=args.updates * rivals.STEPS_PER_UPDATE,
        track_traj_ids=False,
        compile_policy=args.compile,
    )
    rows = TensorDictReplayBuffer(
        storage=LazyTensorStorage(rivals.STEPS_PER_UPDATE),
        sampler=SamplerWithoutReplacement(),
        batch_size=args.minibatch_size,
    )
    add_advantages = GAE(gamma=rivals.GAMMA, lmbda=rivals.GAE_LAMBDA, value_network=critic)
    ppo_loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=rivals.CLIP,
        entropy_bonus=False,
        critic_coeff=0.5,
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(ppo_loss.parameters(), lr=args.learning_rate, eps=1e-5)

    def optimize(minibatch: TensorDict) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = ppo_loss(minibatch)
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        nn.utils.clip_grad_norm_(ppo_loss.parameters(), rivals.MAX_GRAD_NORM)
        optimizer.step()

    if args.compile:
        optimize = compile_with_warmup(optimize)
    for rollout in collector:
        with torch.no_grad():
            rollout = add_advantages(rollout)
        rows.extend(rollout.reshape(-1))
        for _ in range(args.epochs):
            for minibatch in rows:
                optimize(minibatch)
        collector.update_policy_weights_()
        report.update()
    collector.shutdown()
    report.end(args, torchrl.__version__)


if __name__ == "__main__":
    parser = rivals.make_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile policy and optimizer step")
    main(parser.parse_args())
