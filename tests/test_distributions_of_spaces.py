import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.testing import assert_close

from rl.args import CommonArgs
from rl.environments.rollout import collect_rollout
from rl.ppo.agent import DISTRIBUTIONS, Agent

LOW, HIGH = np.array([[-1, -2], [0, -np.inf]]), np.array([[1, 3], [0.5, np.inf]])
CHOICES = [MultiDiscrete([2, 3, 4]), MultiDiscrete([[2, 3], [4, 2]], start=[[1, -1], [0, 5]])]
SWITCHES = [MultiBinary(3), MultiBinary([2, 2])]
BOXES = [Box(-2, 2, (3,)), Box(-1, 1, (2,), np.float64), Box(LOW, HIGH, dtype=np.float64), Box(-1, 1, ())]
SPACES = [*CHOICES, *SWITCHES, *BOXES]
DRAWS = 40_000


def name(value):
    return " ".join(f"{value} {value.dtype}".split()) if isinstance(value, gym.Space) else ""


def make(space):
    """A distribution in double precision, standard deviations other than one, and outputs of a network for it."""
    distribution = DISTRIBUTIONS[type(space)](space).double()
    generator = torch.Generator().manual_seed(0)
    if isinstance(space, Box):
        distribution.log_std.data.copy_(torch.linspace(-0.7, 0.4, distribution.num_outputs))
    return distribution, torch.randn(5, distribution.num_outputs, generator=generator, dtype=torch.float64)


def truths(space, distribution, outputs):
    """PyTorch's distributions of the entries of an action."""
    if isinstance(space, MultiDiscrete):
        return [Categorical(logits=part) for part in outputs.split(space.nvec.flatten().tolist(), -1)]
    if isinstance(space, MultiBinary):
        return [Bernoulli(logits=outputs[..., i]) for i in range(outputs.shape[-1])]
    return [Independent(Normal(outputs, distribution.log_std.exp()), 1)]


def draw(distribution, outputs):
    """Many actions for one row of outputs, [draws, K]."""
    noise = torch.from_numpy(distribution.draw_noise(np.random.default_rng(0), DRAWS))
    return distribution.sample(outputs, noise).detach()


@pytest.mark.parametrize("space", SPACES, ids=name)
def test_log_probabilities_and_entropies_equal_those_of_torch(space):
    distribution, outputs = make(space)
    actions = distribution.sample(outputs, torch.from_numpy(distribution.draw_noise(np.random.default_rng(1), 5)))
    parts = truths(space, distribution, outputs)
    taken = [actions] if isinstance(space, Box) else list(actions.to(torch.float64).unbind(-1))
    log_probs, entropies = distribution.log_prob_and_entropy(outputs, actions)
    assert_close(log_probs, sum(part.log_prob(action) for part, action in zip(parts, taken, strict=True)))
    assert_close(entropies, sum(part.entropy() for part in parts))


@pytest.mark.parametrize("space", SPACES, ids=name)
def test_log_probabilities_keep_the_leading_axes(space):
    distribution, outputs = make(space)
    actions = distribution.greedy(outputs)
    apart = distribution.log_prob_and_entropy(outputs[:4], actions[:4])
    together = distribution.log_prob_and_entropy(outputs[:4].unflatten(0, (2, 2)), actions[:4].unflatten(0, (2, 2)))
    for flat, unflat in zip(apart, together, strict=True):
        assert_close(unflat, flat.reshape(2, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("space", [*CHOICES, *SWITCHES], ids=name)
def test_every_combination_of_choices_is_drawn_as_often_as_torchs_probabilities_say(space):
    distribution, outputs = make(space)
    parts = truths(space, distribution, outputs[0])
    sizes = space.nvec.flatten().tolist() if isinstance(space, MultiDiscrete) else [2] * distribution.num_outputs
    combinations = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in sizes))
    p = torch.stack([part.log_prob(column) for part, column in zip(parts, combinations.T, strict=True)]).sum(0).exp()
    assert p.sum() == pytest.approx(1)
    drawn = draw(distribution, outputs[0]).to(torch.float64)
    frequencies = (drawn[:, None] == combinations).all(-1).double().mean(0)
    assert ((frequencies - p).abs() < 5 * (p * (1 - p) / DRAWS).sqrt()).all()


@pytest.mark.parametrize("space", BOXES, ids=name)
def test_gaussian_actions_have_the_moments_and_the_tails_of_independent_normal_ones(space):
    distribution, outputs = make(space)
    z = (draw(distribution, outputs[0]) - outputs[0]) / distribution.log_std.exp().detach()
    size = distribution.num_outputs
    assert z.mean(0).abs().max() < 5 / math.sqrt(DRAWS)
    second_moments = z.T @ z / DRAWS
    sigma = (1 + torch.eye(size, dtype=torch.float64)).sqrt() / math.sqrt(DRAWS)
    assert ((second_moments - torch.eye(size)).abs() < 5 * sigma).all()
    for width in (1, 2):
        p = math.erf(width / math.sqrt(2))
        assert ((z.abs() < width).double().mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / DRAWS)


@pytest.mark.parametrize("space", SPACES, ids=name)
def test_consecutive_draws_are_independent(space):
    distribution, outputs = make(space)
    drawn = draw(distribution, torch.zeros_like(outputs[0])).to(torch.float64)
    z = (drawn - drawn.mean(0)) / drawn.std(0)
    assert ((z[1:] * z[:-1]).mean(0).abs() < 5 / math.sqrt(DRAWS)).all()


@pytest.mark.parametrize("space", [*CHOICES, *SWITCHES], ids=name)
def test_no_action_is_more_probable_than_the_greedy_one(space):
    distribution, outputs = make(space)
    sizes = space.nvec.flatten().tolist() if isinstance(space, MultiDiscrete) else [2] * distribution.num_outputs
    combinations = torch.cartesian_prod(*map(torch.arange, sizes))
    for row in outputs:
        parts = truths(space, distribution, row)
        of_all = sum(part.log_prob(column.double()) for part, column in zip(parts, combinations.T, strict=True))
        assert distribution.greedy(row).tolist() == combinations[of_all.argmax()].tolist()


@pytest.mark.parametrize("space", BOXES, ids=name)
def test_the_greedy_gaussian_action_is_what_the_environment_gets_on_average(space):
    distribution, outputs = make(space)
    for row in outputs:
        taken = distribution.to_env(draw(distribution, row)).reshape(DRAWS, -1)
        assert ((distribution.greedy(row) - taken.mean(0)).abs() < 5 * taken.std(0) / math.sqrt(DRAWS)).all()


def test_the_greedy_gaussian_action_stays_within_the_bounds_however_far_the_mean_is():
    distribution = DISTRIBUTIONS[Box](Box(LOW, HIGH)).to(torch.float32)
    means = torch.tensor([[-1e4] * 4, [1e4] * 4, [0.0] * 4])
    assert distribution.greedy(means)[:, 3].tolist() == [-1e4, 1e4, 0.0]  # without bounds
    assert_close(distribution.greedy(means)[:2], distribution.to_env(means[:2]).reshape(2, 4).clamp(-1e4, 1e4))


def test_actions_are_clipped_to_the_bounds_of_their_entry_on_the_way_to_the_environment_only():
    distribution = DISTRIBUTIONS[Box](Box(LOW, HIGH, dtype=np.float64))
    actions = torch.tensor([[-9.0, -9, -9, -9], [9, 9, 9, 9], [0.25, -1.5, 0.125, 3]])
    before = actions.clone()
    assert distribution.to_env(actions).tolist() == [
        [[-1, -2], [0, -9]],
        [[1, 3], [0.5, 9]],
        [[0.25, -1.5], [0.125, 3]],
    ]
    assert torch.equal(actions, before)


@pytest.mark.parametrize(
    ("space", "actions", "expected"),
    [
        (Discrete(3, start=5), [0, 2], [5, 7]),
        (Discrete(3, start=-1), [0, 2], [-1, 1]),
        (Discrete(3), [0, 2], [0, 2]),
        (CHOICES[1], [[0, 0, 0, 0], [1, 2, 3, 1]], [[[1, -1], [0, 5]], [[2, 1], [3, 6]]]),
        (SWITCHES[1], [[0, 1, 1, 0], [1, 0, 0, 1]], [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]),
    ],
    ids=name,
)
def test_choices_reach_the_environment_in_the_shape_of_the_space_and_counted_from_its_start(space, actions, expected):
    assert DISTRIBUTIONS[type(space)](space).to_env(torch.tensor(actions)).tolist() == expected


@pytest.mark.parametrize(
    "space",
    [
        *SPACES,
        Discrete(3, start=5),
        Discrete(3, dtype=np.int32),
        MultiDiscrete([2, 3], dtype=np.int32, start=[-1, 4]),
        Box(-1, 1, (2,), np.float16),
        Box(-np.inf, 0.1, (2,)),
    ],
    ids=name,
)
def test_whatever_the_policy_draws_the_environment_receives_an_action_of_its_space(space):
    distribution = DISTRIBUTIONS[type(space)](space)
    noise = torch.from_numpy(distribution.draw_noise(np.random.default_rng(0), 100))
    rows = distribution.to_env(distribution.sample(torch.zeros(distribution.num_outputs), 3 * noise).detach()).numpy()
    assert (rows.shape, rows.dtype) == ((100, *space.shape), space.dtype)
    for row in rows:
        assert space.contains(row)


def test_the_learner_keeps_the_unclipped_actions_and_their_log_probabilities():
    torch.manual_seed(0)
    agent = Agent(Box(-1, 1, (3,)), Box(-1, 1, (2,)), CommonArgs())
    agent.distribution.log_std.data.fill_(2.0)  # most actions leave the bounds

    class Envs:
        """Notes what arrives."""

        num_envs, single_observation_space, received = 2, Box(-1, 1, (3,)), []

        def step(self, actions):
            self.received.append(actions.copy())
            return np.zeros((2, 3)), np.zeros(2), np.zeros(2, dtype=bool), np.zeros(2, dtype=bool), {}

    envs = Envs()
    noise = torch.randn(6, 2, 2)
    rollout, _, _ = collect_rollout(agent, envs, np.zeros((2, 3), dtype=np.float32), noise)
    means = agent.actor(agent.encoder(rollout.observations)).detach()
    assert_close(rollout.actions, means + math.exp(2.0) * noise)
    assert_close(rollout.log_probs, Normal(means, math.exp(2.0)).log_prob(rollout.actions).sum(-1))
    assert (rollout.actions.abs() > 1).float().mean() > 0.5
    np.testing.assert_array_equal(envs.received, rollout.actions.clamp(-1, 1))


def test_the_gradients_of_the_standard_deviations_are_those_of_the_closed_forms():
    distribution, means = make(Box(-1, 1, (3,)))
    actions = means + torch.arange(15).reshape(5, 3) / 7
    log_probs, entropies = distribution.log_prob_and_entropy(means, actions)
    z = (actions - means) / distribution.log_std.exp().detach()
    (of_log_probs,) = torch.autograd.grad(log_probs.sum(), distribution.log_std)
    (of_entropies,) = torch.autograd.grad(entropies.sum(), distribution.log_std)
    assert_close(of_log_probs, (z.square() - 1).sum(0))  # d/d log σ of -z²/2 - log σ
    assert_close(of_entropies, torch.full((3,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("space", SPACES, ids=name)
def test_gradients_flow_into_every_parameter_of_the_policy(space):
    torch.manual_seed(0)
    agent = Agent(Box(-1, 1, (3,)), space, CommonArgs(activation_function="tanh"))
    observations = torch.rand(50, 3)
    noise = torch.from_numpy(agent.distribution.draw_noise(np.random.default_rng(0), 50))
    log_probs, entropies, values = agent(observations, agent.act(observations, noise).detach())
    (log_probs.sum() + entropies.sum() + values.sum()).backward()
    names = [name for name, parameter in agent.named_parameters() if not parameter.grad.any()]
    assert names == []
    assert ("distribution.log_std" in dict(agent.named_parameters())) == isinstance(space, Box)
