"""Our PPO against Stable-Baselines3's, which none of us wrote.

Both sides run their own code: `train_torch.main` here, `PPO.learn` there. They share what is drawn: first weights,
seeds of the environments, action noise, order of the rows. All else (rollouts, advantages, losses, gradients,
clipping, Adam) each computes for itself. Where conventions differ, a comment below says what the common ground is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

import train_torch
from benchmarks.runs import run_folders, scalars
from rl.args import TorchArgs
from rl.environments.making import make_envs, reset_envs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import Agent
from rl.ppo.distributions import draw_action_noise
from rl.ppo.gae import generalized_advantage_estimation
from rl.run import checkpoints
from rl.run import run as run_module
from rl.run.ending import Ending, leave_process_group
from rl.seeding import Purpose, episode_seed, stream, stream_seed

sb3 = pytest.importorskip("stable_baselines3", reason="needs stable-baselines3: pip install -r requirements-dev.txt")

# Time limits so short that a rollout holds truncations beside terminations.
gym.register("ShortCartPole-v1", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
gym.register("ShortLunarLander-v3", "gymnasium.envs.box2d:LunarLander", max_episode_steps=80)
short_episodes = pytest.mark.parametrize("env_id", ["ShortCartPole-v1", "ShortLunarLander-v3"])

# None is a default of either side, so none can be forgotten; the gradients and many of the ratios are clipped.
HYPERPARAMETERS = {
    "learning_rate": 2e-3,
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "clip_coef": 0.05,
    "ent_coef": 0.01,
    "vf_coef": 0.25,
    "max_grad_norm": 0.3,
}

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}  # of float32, after some fifty gradient steps

LOSS_TAGS = {
    "Loss/policy_loss": "train/policy_gradient_loss",
    "Loss/value_loss": "train/value_loss",
    "Loss/entropy_loss": "train/entropy_loss",
    "Info/clip_fraction": "train/clip_fraction",
    "Info/learning_rate": "train/learning_rate",
}
ONE_STEP_TAGS = {  # means over an update here, of its last step or its last epoch there
    "Loss/loss": "train/loss",
    "Info/approx_kl": "train/approx_kl",
}


class NormalizeOnceBuffer(sb3.common.buffers.RolloutBuffer):
    """Normalises the advantages as we do, once per update over all rows; there they are in each minibatch."""

    def compute_returns_and_advantage(self, *args, **kwargs):
        super().compute_returns_and_advantage(*args, **kwargs)
        self.advantages = (self.advantages - self.advantages.mean()) / (self.advantages.std() + 1e-8)


class SeededEpisodes(gym.Wrapper):
    """Gives every episode the seed that it has with us; there only the first has one."""

    def reset(self, *, seed: int | None = None, **kwargs):
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode += 1
        return super().reset(seed=episode_seed(self.seed, self.episode), **kwargs)


def make_agent(args: TorchArgs) -> Agent:
    """Make the agent that the script makes."""
    with gym.make(args.env_id) as env:
        torch.manual_seed(stream_seed(args.seed, Purpose.NETWORK))
        return Agent(env.observation_space, env.action_space, args)


def make_twin(agent: Agent, args: TorchArgs, monkeypatch: pytest.MonkeyPatch) -> "sb3.PPO":
    """Make Stable-Baselines3's PPO with our weights, hyperparameters and random numbers."""
    num_steps = args.rollout_length(world_size=1)
    model = sb3.PPO(
        "MlpPolicy",
        sb3.common.vec_env.DummyVecEnv([lambda: SeededEpisodes(gym.make(args.env_id))] * args.num_envs),
        # It lowers the learning rate before each update, so that the last one's is 0; we lower it after.
        learning_rate=lambda remaining: args.learning_rate * (remaining + 1 / args.num_updates),
        n_steps=num_steps,
        batch_size=args.per_rank_batch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=None,  # there: the clipped error of the values; here: the larger of the clipped and the unclipped
        normalize_advantage=False,
        rollout_buffer_class=NormalizeOnceBuffer if args.normalize_advantages else None,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        policy_kwargs={"activation_fn": {"relu": nn.ReLU, "tanh": nn.Tanh}[args.activation_function]},
        device="cpu",
    )
    for theirs, ours in zip(parameters_of(model), agent.parameters(), strict=True):
        theirs.data.copy_(ours.data)

    envs, updates = range(args.num_envs), range(1, args.num_updates + 1)
    model.env._seeds = [stream_seed(args.seed, Purpose.ENVIRONMENT, env) for env in envs]
    noise = (row for u in updates for row in draw_action_noise(agent.distribution, num_steps, envs, args.seed, u))
    policy = model.policy.action_dist
    policy.sample = lambda: (policy.distribution.logits + next(noise)).argmax(-1)
    orders = (stream(args.seed, Purpose.SHUFFLE, u, epoch, 0) for u in updates for epoch in range(args.update_epochs))
    monkeypatch.setattr(np.random, "permutation", lambda rows: next(orders).permutation(rows))
    return model


def parameters_of(model: "sb3.PPO") -> list[nn.Parameter]:
    """Return its parameters in the order of ours."""
    policy, hidden = model.policy, model.policy.mlp_extractor
    layers = (hidden.policy_net, policy.action_net, hidden.value_net, policy.value_net)
    return [parameter for layer in layers for parameter in layer.parameters()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def recorded_steps(parameters: list[nn.Parameter] | None = None) -> Iterator[list[dict[str, list[Tensor]]]]:
    """Record every gradient that an optimizer is given, and every weight that it leaves; of its own parameters."""
    steps = []

    def before(optimizer, *_):
        steps.append({"gradients": [p.grad.clone() for p in parameters or optimizer.param_groups[0]["params"]]})

    def after(optimizer, *_):
        steps[-1]["weights"] = [p.detach().clone() for p in parameters or optimizer.param_groups[0]["params"]]

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run train_torch.py, and return the last value of each scalar that it logs."""

    def run(args: TorchArgs) -> dict[str, float]:
        monkeypatch.chdir(tmp_path)
        for module in (checkpoints, run_module):
            monkeypatch.setattr(module, "ending", ending)
        train_torch.main(args)
        (folder,) = run_folders(tmp_path)
        return {tag: points[-1][1] for tag, points in scalars(folder).items()}

    ending = Ending()
    yield run
    ending.closing.close()
    leave_process_group()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_log_probabilities_entropies_and_values_equal_those_of_stable_baselines3(activation, monkeypatch):
    args = TorchArgs(env_id="LunarLander-v3", activation_function=activation)
    agent = make_agent(args)
    observations, actions = 10 * torch.randn(256, 8), torch.randint(4, (256,))
    log_probs, entropies, values = agent(observations, actions)

    evaluated = make_twin(agent, args, monkeypatch).policy.evaluate_actions(observations, actions)

    assert_close((values.unsqueeze(-1), log_probs, entropies), evaluated)


@short_episodes
def test_rollouts_and_advantages_equal_those_of_stable_baselines3(env_id, monkeypatch):
    args = TorchArgs(env_id=env_id, num_steps=512, normalize_advantages=False, **HYPERPARAMETERS)
    agent = make_agent(args)
    envs = make_envs(args, args.num_envs)
    noise = draw_action_noise(agent.distribution, args.rollout_length(1), range(args.num_envs), args.seed, update=1)
    rollout, _, _ = collect_rollout(agent, envs, reset_envs(envs, args.seed, 0), noise)
    advantages = generalized_advantage_estimation(
        rollout.rewards, rollout.values, rollout.next_values, rollout.dones, args.gamma, args.gae_lambda
    )

    model = make_twin(agent, args, monkeypatch)
    model.train = lambda: None
    model.learn(args.num_steps)
    theirs = model.rollout_buffer

    truncated = rollout.dones & (rollout.next_values != 0)
    assert truncated.any() and (rollout.dones & ~truncated).any()
    # There the reward of a truncated step holds γ V(final observation); here that stays apart, in `next_values`.
    rewards = rollout.rewards + args.gamma * rollout.next_values * rollout.dones
    for name, ours in {
        "observations": rollout.observations,
        "actions": rollout.actions.unsqueeze(-1),
        "log_probs": rollout.log_probs,
        "values": rollout.values,
        "rewards": rewards,
        "advantages": advantages,
        "returns": advantages + rollout.values,
    }.items():
        assert_close(ours, torch.from_numpy(getattr(theirs, name)), msg=lambda text, name=name: f"{name}: {text}")
    assert np.array_equal(rollout.dones[:-1], theirs.episode_starts[1:])


@short_episodes
@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"per_rank_batch_size": 512, "update_epochs": 1}, id="one gradient step"),
        pytest.param({"per_rank_batch_size": 64, "update_epochs": 1}, id="one epoch"),
        pytest.param({"total_timesteps": 1536}, id="three updates"),
        pytest.param({"normalize_advantages": False}, id="advantages as they are"),
    ],
)
def test_losses_gradients_and_weights_of_a_run_equal_those_of_stable_baselines3(env_id, args, run_script, monkeypatch):
    data = {"total_timesteps": 512, "num_steps": 512, "per_rank_batch_size": 128, "update_epochs": 4}
    args = TorchArgs(env_id=env_id, activation_function="tanh", **HYPERPARAMETERS | data | args)
    agent = make_agent(args)
    model = make_twin(agent, args, monkeypatch)

    with recorded_steps() as steps:
        logged = run_script(args)
    with recorded_steps(parameters_of(model)) as their_steps:
        model.learn(args.total_timesteps, log_interval=None)

    assert_close(steps, their_steps, **ROUNDING)
    tags = LOSS_TAGS | ONE_STEP_TAGS if len(steps) == 1 else LOSS_TAGS
    for tag, their_tag in tags.items():
        assert logged[tag] == pytest.approx(float(model.logger.name_to_value[their_tag]), rel=1e-5, abs=2e-6), tag
    assert logged["Info/clip_fraction"] > 0 or args.update_epochs == 1
