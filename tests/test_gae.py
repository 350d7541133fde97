import numpy as np
import pytest
import torch
from torch import Tensor

from rl.ppo.gae import generalized_advantage_estimation
from rl.ppo.normalize import moments as advantage_moments
from rl.ppo.normalize import normalize_advantages


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def advantages_of(rewards, values, next_values, dones, gamma, gae_lambda):
    """One environment, lists in, list out."""
    columns = column(*rewards), column(*values), column(*next_values), torch.tensor(dones, dtype=torch.bool)[:, None]
    return generalized_advantage_estimation(*columns, gamma, gae_lambda).squeeze(1).tolist()


def slow_advantages(rewards, values, next_values, dones, gamma, gae_lambda):
    """A_t = Σ_k (γλ)^k δ_{t+k} to the end of the episode or of the rollout (equation 16), as it stands."""
    rewards, values, next_values = (x.double().numpy() for x in (rewards, values, next_values))
    advantages = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, len(rewards)):
            delta = rewards[k, n] + gamma * next_values[k, n] - values[k, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
            if dones[k, n]:
                break
    return torch.from_numpy(advantages)


def random_rollout(num_steps, num_envs, done_rate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, num_steps, num_envs, generator=generator)
    return rewards, values, next_values, torch.rand(num_steps, num_envs, generator=generator) < done_rate


def assert_equal_within_float32(actual: Tensor, expected: Tensor):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("done_rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.9), (0.9, 0.0)])
def test_advantages_equal_the_sum_of_the_paper_written_out(gamma, gae_lambda, done_rate):
    rollout = random_rollout(40, 3, done_rate)
    actual = generalized_advantage_estimation(*rollout, gamma, gae_lambda)
    assert_equal_within_float32(actual, slow_advantages(*rollout, gamma, gae_lambda))


def test_advantages_of_a_terminated_episode_worked_out_by_hand():
    # δ = (1 + ½ 4 - 2, 2 + ½ 6 - 4, 3 + 0 - 6) = (1, 1, -3), γλ = ¼
    actual = advantages_of([1, 2, 3], [2, 4, 6], [4, 6, 0], [False, False, True], gamma=0.5, gae_lambda=0.5)
    assert actual == [1 + 0.25 * 0.25, 0.25, -3]


def test_advantages_of_a_truncated_episode_look_at_the_value_of_its_final_observation():
    # as above, but δ_2 = 3 + ½ 8 - 6 = 1
    actual = advantages_of([1, 2, 3], [2, 4, 6], [4, 6, 8], [False, False, True], gamma=0.5, gae_lambda=0.5)
    assert actual == [1 + 0.25 * 1.25, 1.25, 1]


def test_advantages_do_not_cross_from_one_episode_into_the_next_of_the_same_rollout():
    # two episodes of two steps, the first truncated: δ = (1, 2, 4, 8), γλ = ¼
    actual = advantages_of(
        [0, -1, 4, 8], [0, 2, 0, 0], [2, 10, 0, 0], [False, True, False, True], gamma=0.5, gae_lambda=0.5
    )
    assert actual == [1 + 0.25 * 2, 2, 4 + 0.25 * 8, 8]


def test_the_end_of_the_rollout_is_no_end_of_an_episode():
    # the last step goes on: δ = (1 + ½ 2 - 0, 1 + ½ 4 - 2) = (2, 1)
    assert advantages_of([1, 1], [0, 2], [2, 4], [False, False], gamma=0.5, gae_lambda=1.0) == [2.5, 1]


def test_environments_do_not_influence_each_other():
    together = random_rollout(20, 4, 0.2)
    advantages = generalized_advantage_estimation(*together, 0.99, 0.95)
    for n in range(4):
        alone = (x[:, n : n + 1] for x in together)
        assert torch.equal(generalized_advantage_estimation(*alone, 0.99, 0.95), advantages[:, n : n + 1])


def test_with_lambda_0_the_advantage_is_the_temporal_difference_error():
    rewards, values, next_values, dones = random_rollout(30, 3, 0.1)
    actual = generalized_advantage_estimation(rewards, values, next_values, dones, 0.9, 0.0)
    delta = rewards.double() + 0.9 * next_values.double() - values.double()
    assert_equal_within_float32(actual, delta)


@pytest.mark.parametrize("final_value", [0.0, 3.0], ids=["terminated", "truncated"])
def test_with_lambda_1_the_advantage_is_the_discounted_return_minus_the_value(final_value):
    rewards, values, *_ = random_rollout(25, 1, 0.0)
    next_values = torch.cat([values[1:], torch.tensor([[final_value]])])
    dones = torch.zeros(25, 1, dtype=torch.bool)
    dones[-1] = True
    actual = generalized_advantage_estimation(rewards, values, next_values, dones, 0.97, 1.0)
    discounted = [
        sum(0.97**k * reward for k, reward in enumerate(rewards[t:, 0].tolist())) + 0.97 ** (25 - t) * final_value
        for t in range(25)
    ]
    assert_equal_within_float32(actual[:, 0], torch.tensor(discounted) - values[:, 0].double())


def test_advantages_carry_no_gradient():
    rewards, values, next_values, dones = random_rollout(5, 2, 0.2)
    advantages = generalized_advantage_estimation(
        rewards, values.requires_grad_(), next_values.requires_grad_(), dones, 0.99, 0.95
    )
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad


def test_moments_are_count_sum_and_sum_of_squares():
    moments = advantage_moments(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    assert moments.dtype == torch.float64
    assert moments.tolist() == [4, 2, 30]


def test_moments_added_over_parts_are_the_moments_of_the_whole():
    advantages = 100 + torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    summed = sum(advantage_moments(part) for part in advantages.split([7, 33, 20]))
    torch.testing.assert_close(summed, advantage_moments(advantages), rtol=1e-14, atol=0)


# With mean 1000, sums of squares in float32 would leave nothing of the variance.
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-5.0, 2.0), (1000.0, 0.1)])
def test_normalized_advantages_have_mean_0_and_standard_deviation_1(mean, std):
    advantages = mean + std * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    normalized = normalize_advantages(advantages, advantage_moments(advantages))
    exact = advantages.double().numpy()
    expected = (exact - exact.mean()) / (exact.std() + 1e-8)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-6, atol=1e-6)


def test_ranks_that_add_up_their_moments_normalize_like_one_process():
    advantages = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    parts = advantages.split([1, 3], dim=1)
    moments = sum(advantage_moments(part) for part in parts)
    together = torch.cat([normalize_advantages(part, moments) for part in parts], dim=1)
    alone = advantages.double().numpy()
    np.testing.assert_allclose(together, (alone - alone.mean()) / (alone.std() + 1e-8), rtol=1e-6, atol=1e-6)


# Of 1000 times 0.7 or 1.1, rounding leaves a variance below zero.
@pytest.mark.parametrize("constant", [0.0, 0.7, 1.1, -1000.1])
def test_constant_advantages_become_zero(constant):
    advantages = torch.full((250, 4), constant)
    normalized = normalize_advantages(advantages, advantage_moments(advantages))
    assert torch.equal(normalized, torch.zeros(250, 4))
