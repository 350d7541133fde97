import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rl.ppo.distributions import Categorical, DiagonalGaussian, draw_action_noise

LOGITS = torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 0.5], [-5.0, 3.0, 3.0]])


@pytest.mark.parametrize("logits", LOGITS)
def test_actions_are_drawn_as_often_as_softmax_says(logits):
    draws = 40_000
    distribution = Categorical(Discrete(3))
    noise = torch.from_numpy(distribution.draw_noise(np.random.default_rng(0), draws))
    counts = distribution.sample(logits, noise).bincount(minlength=3)
    weights = [math.exp(logit) for logit in logits]
    for weight, count in zip(weights, counts, strict=True):
        p = weight / sum(weights)
        five_sigma = 5 * math.sqrt(p * (1 - p) / draws)
        assert count / draws == pytest.approx(p, abs=five_sigma)


def test_consecutive_actions_are_independent():
    draws = 40_000
    distribution = Categorical(Discrete(2))
    noise = torch.from_numpy(distribution.draw_noise(np.random.default_rng(0), draws))
    actions = distribution.sample(torch.zeros(2), noise)
    repeated = (actions[1:] == actions[:-1]).double().mean().item()
    assert repeated == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / (draws - 1)))


def test_the_greedy_action_is_the_most_probable_one():
    assert Categorical(Discrete(3)).greedy(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]


def test_without_noise_the_sample_is_the_greedy_action():
    distribution = Categorical(Discrete(3))
    assert torch.equal(distribution.sample(LOGITS[1:], torch.zeros(3)), distribution.greedy(LOGITS[1:]))


def test_samples_have_one_action_for_each_row():
    noise = torch.zeros(7, 4, 3)
    actions = Categorical(Discrete(3)).sample(torch.zeros(7, 4, 3), noise)
    assert (actions.shape, actions.dtype) == ((7, 4), torch.int64)


def test_noise_has_a_number_for_each_step_environment_and_action():
    noise = draw_action_noise(Categorical(Discrete(3)), 7, range(4), seed=0, update=1)
    assert (noise.shape, noise.dtype) == ((7, 4, 3), torch.float32)


def test_the_noise_of_an_environment_does_not_depend_on_the_others_drawn_beside_it():
    distribution = Categorical(Discrete(3))
    together = draw_action_noise(distribution, 7, range(4), seed=0, update=1)
    for parts in ([range(0, 2), range(2, 4)], [range(0, 1), range(1, 4)]):
        apart = [draw_action_noise(distribution, 7, indices, seed=0, update=1) for indices in parts]
        assert torch.equal(torch.cat(apart, dim=1), together)


def test_the_noise_differs_over_environments_updates_seeds_and_steps():
    noises = [
        draw_action_noise(Categorical(Discrete(2)), 5, range(3), seed, update) for seed in (0, 1) for update in (1, 2)
    ]
    assert torch.stack(noises).unique().numel() == 2 * 2 * 5 * 3 * 2


def test_correlated_noise_is_standard_normal_and_a_lag_of_k_steps_correlates_with_the_kth_power():
    distribution = DiagonalGaussian(Box(-1, 1, (2,)))
    noise = draw_action_noise(distribution, 200_000, range(2), seed=0, update=1, correlation=0.9).double()
    # An autoregressive mean has the deviation of one of (1 - ρ) / (1 + ρ) as many independent numbers.
    bound = 5 * math.sqrt((1 + 0.9) / (1 - 0.9) / len(noise))
    torch.testing.assert_close(noise.mean(0), torch.zeros(2, 2, dtype=torch.float64), atol=bound, rtol=0)
    torch.testing.assert_close(noise.square().mean(0), torch.ones(2, 2, dtype=torch.float64), atol=2 * bound, rtol=0)
    for lag in (1, 2, 5):
        correlation = (noise[lag:] * noise[:-lag]).mean(0)
        torch.testing.assert_close(correlation, torch.full_like(correlation, 0.9**lag), atol=2 * bound, rtol=0)
    apart = (noise[..., 0] * noise[..., 1]).mean(0)  # the entries of an action do not correlate
    torch.testing.assert_close(apart, torch.zeros_like(apart), atol=2 * bound, rtol=0)
