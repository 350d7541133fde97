from math import log

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rl.args import CommonArgs
from rl.ppo.agent import Agent
from rl.ppo.batch import Batch
from rl.ppo.distributions import Categorical
from rl.ppo.loss import Losses, clipped_value_error, ppo_loss, squared_value_error, surrogate_objective


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [
        (1.5, 1.0, 1.2),  # above the clip, a good action: nothing to be gained by going further
        (1.5, -1.0, -1.5),  # above, a bad action: the way back is open
        (0.5, 1.0, 0.5),  # below, a good action: the way back is open
        (0.5, -1.0, -0.8),  # below, a bad action: nothing to be gained
        (1.1, 2.0, 2.2),  # within
        (0.9, -2.0, -1.8),
    ],
)
def test_surrogate_objective_on_all_sides_of_the_clip(ratio, advantage, objective):
    actual = surrogate_objective(tensor(log(ratio)), tensor(advantage), clip_coef=0.2)
    assert actual.item() == pytest.approx(objective, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (3.1, 0.81),  # within the clip around 3: (3.1 - 4)²
        (3.5, 0.64),  # the clipped 3.2 is farther from 4 than 3.5 is
        (2.0, 4.0),  # the clipped 2.8 is closer to 4 than 2 is
        (6.0, 4.0),  # beyond the return: 6 is farther from 4 than the clipped 3.2 is
    ],
)
def test_clipped_value_error_is_the_larger_of_both_squared_errors(value, error):
    actual = clipped_value_error(tensor(value), old_values=tensor(3.0), returns=tensor(4.0), clip_coef=0.2)
    assert actual.item() == pytest.approx(error, rel=1e-12)


def test_value_error_is_the_square_without_a_half():
    assert squared_value_error(tensor(3.0, 1.0), tensor(1.0, 2.0)).tolist() == [4.0, 1.0]


def test_log_probabilities_and_entropies_equal_those_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(50, 3, 5, generator=generator)
    actions = torch.randint(5, (50, 3), generator=generator)
    log_probs, entropies = Categorical(Discrete(5)).log_prob_and_entropy(logits, actions)
    truth = torch.distributions.Categorical(logits=logits.double())
    torch.testing.assert_close(log_probs.double(), truth.log_prob(actions), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropies.double(), truth.entropy(), rtol=1e-6, atol=2e-6)


# Four rows whose terms are worked out by hand, with ε = 0.2.
RATIOS = (1.5, 0.5, 1.1, 0.95)
ADVANTAGES = (1.0, -1.0, 2.0, 0.0)
OBJECTIVES = (1.2, -0.8, 2.2, 0.0)
VALUES, OLD_VALUES, RETURNS = (3.5, 2.0, 1.0, 0.0), (3.0, 3.0, 1.0, 0.0), (4.0, 4.0, 1.0, 3.0)
ERRORS, CLIPPED_ERRORS = (0.25, 4.0, 0.0, 9.0), (0.64, 4.0, 0.0, 9.0)
ENTROPIES = (0.1, 0.2, 0.3, 0.4)


def loss_of_the_four_rows(rows=4, log_probs=None, **flags):
    old_log_probs = tensor(-1.0, -2.0, -3.0, -4.0)
    if log_probs is None:
        log_probs = old_log_probs + tensor(*RATIOS).log()
    minibatch = Batch(
        observations=torch.arange(4.0).unsqueeze(1),
        actions=torch.tensor([0, 1, 1, 0]),
        log_probs=old_log_probs,
        values=tensor(*OLD_VALUES),
        advantages=tensor(*ADVANTAGES),
        returns=tensor(*RETURNS),
    )

    def agent(observations, actions):
        assert observations is minibatch.observations
        assert actions is minibatch.actions
        return log_probs, tensor(*ENTROPIES), tensor(*VALUES)

    return ppo_loss(agent, minibatch, rows, CommonArgs(**({"clip_coef": 0.2} | flags)))


@pytest.mark.parametrize(("clip_vloss", "errors"), [(False, ERRORS), (True, CLIPPED_ERRORS)])
def test_the_terms_of_the_loss_are_means_and_the_loss_is_their_weighted_sum(clip_vloss, errors):
    actual = loss_of_the_four_rows(vf_coef=0.25, ent_coef=0.1, clip_vloss=clip_vloss)
    expected = {
        "loss": -sum(OBJECTIVES) / 4 + 0.25 * sum(errors) / 4 - 0.1 * sum(ENTROPIES) / 4,
        "policy_loss": -sum(OBJECTIVES) / 4,
        "value_loss": sum(errors) / 4,
        "entropy_loss": -sum(ENTROPIES) / 4,
        "approx_kl": sum(ratio - 1 - log(ratio) for ratio in RATIOS) / 4,
        "clip_fraction": 2 / 4,
    }
    assert {name: value.item() for name, value in actual._asdict().items()} == pytest.approx(expected, rel=1e-12)


def test_every_term_is_divided_by_the_rows_that_the_caller_names():
    means, halves = loss_of_the_four_rows(rows=4, ent_coef=0.1), loss_of_the_four_rows(rows=8, ent_coef=0.1)
    for name in Losses._fields:
        assert getattr(halves, name).item() == pytest.approx(getattr(means, name).item() / 2, rel=1e-12), name


def test_the_approximate_kl_estimates_the_true_one():
    """Over all actions, weighted by the old policy, Σ p (ρ - 1 - log ρ) is KL(p ‖ q) exactly."""
    old, new = tensor(0.2, 0.3, 0.5), tensor(0.5, 0.25, 0.25)
    counts = [2, 3, 5]  # rows of each action
    actions = torch.arange(3).repeat_interleave(torch.tensor(counts))
    zeros = torch.zeros(10, dtype=torch.float64)
    minibatch = Batch(zeros.unsqueeze(1), actions, old.log()[actions], zeros, zeros, zeros)
    losses = ppo_loss(lambda _, a: (new.log()[a], zeros, zeros), minibatch, 10, CommonArgs())
    truth = torch.distributions.kl_divergence(*(torch.distributions.Categorical(p) for p in (old, new)))
    assert losses.approx_kl.item() == pytest.approx(truth.item(), rel=1e-12)


def test_a_clipped_row_gives_no_gradient():
    log_probs = (tensor(-1.0, -2.0, -3.0, -4.0) + tensor(*RATIOS).log()).requires_grad_()
    loss_of_the_four_rows(log_probs=log_probs).loss.backward()
    # d(-ρ A / 4) / d log π = -ρ A / 4 where the ratio is not clipped
    np.testing.assert_allclose(log_probs.grad, [0, 0, -1.1 * 2 / 4, 0], rtol=1e-12)


def test_the_measures_of_the_policys_move_carry_no_gradient():
    log_probs = tensor(-1.0, -2.0, -3.0, -4.0).requires_grad_()
    losses = loss_of_the_four_rows(log_probs=log_probs)
    assert [name for name, value in losses._asdict().items() if not value.requires_grad] == [
        "value_loss",  # these two because the agent of this test has constant values and entropies
        "entropy_loss",
        "approx_kl",
        "clip_fraction",
    ]


def random_batch(rows):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(4, rows, generator=generator, dtype=torch.float64)
    observations = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return Batch(observations, torch.randint(2, (rows,), generator=generator), -1 + 0.3 * numbers[0], *numbers[1:])


def gradient(agent, minibatch, rows, args):
    agent.zero_grad()
    ppo_loss(agent, minibatch, rows, args).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])


@pytest.mark.parametrize("sizes", [(3, 2), (4, 1), (5, 0)])
def test_gradients_of_unequal_parts_average_to_the_gradient_of_the_whole(sizes):
    args = CommonArgs(ent_coef=0.01, clip_vloss=True)
    torch.manual_seed(0)
    agent = Agent(Box(-1, 1, (3,)), Discrete(2), args).double()
    batch = random_batch(5)
    parts = (Batch(*fields) for fields in zip(*(field.split(sizes) for field in batch), strict=True))
    averaged = sum(gradient(agent, part, 5 / 2, args) for part in parts) / 2
    whole = gradient(agent, batch, 5, args)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(averaged, whole, rtol=1e-12, atol=1e-14)
