import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch.testing import assert_close

from rl.ppo.normalize import ObservationNormalizer, RewardNormalizer, mean_and_variance, moments, normalize_advantages


def stream(*shape, seed=0):
    """Numbers far from mean 0 and variance 1, different in each place of the last axis."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=shape) * np.linspace(0.5, 50, shape[-1]) - 30).float()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_the_moments_of_all_parts_and_ranks_add_up_to_those_of_the_whole_stream(shape):
    whole = stream(12, 8, *shape)
    ranks = [rank.split([5, 7]) for rank in whole.split([2, 6], dim=1)]  # two ranks, two rollouts of each
    total = sum(moments(part) for rank in ranks for part in rank)
    mean, variance = mean_and_variance(total)
    rows = whole.double().numpy().reshape(96, *shape)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-10)
    assert (total.dtype, total.shape) == (torch.float64, (3, *shape))
    assert (total[0] == 96).all()


def test_moments_of_bytes_and_of_numbers_far_from_zero_do_not_overflow_or_cancel():
    rng = np.random.default_rng(0)
    data = rng.integers(256, size=(64, 4, 3), dtype=np.uint8)
    _, variance = mean_and_variance(moments(torch.from_numpy(data)))
    np.testing.assert_allclose(variance, data.reshape(-1, 3).var(0), rtol=1e-10)
    far = torch.from_numpy(rng.normal(10_000, 0.5, size=(64, 4))).float()
    _, variance = mean_and_variance(moments(far))
    np.testing.assert_allclose(variance, far.double().numpy().var(), rtol=1e-5)


def test_what_never_changes_has_no_variance_below_zero():
    _, variance = mean_and_variance(sum(moments(torch.full((7, 3), 0.1)) for _ in range(9)))
    assert 0 <= variance < 1e-15


def test_observations_are_normalised_with_numpys_mean_and_deviation_of_everything_so_far():
    normalizer = ObservationNormalizer(Box(-np.inf, np.inf, (4,)))
    rollouts = [stream(6, 3, 4, seed=seed) * (1 + seed) for seed in range(4)]
    for count, rollout in enumerate(rollouts, start=1):
        for rank in rollout.split([1, 2], dim=1):
            normalizer.update(moments(rank))
        so_far = torch.cat(rollouts[:count]).double().numpy().reshape(-1, 4)
        expected = (rollout.double().numpy() - so_far.mean(0)) / so_far.std(0)
        assert np.abs(expected).max() < 10
        np.testing.assert_allclose(normalizer(rollout), expected, rtol=1e-4, atol=1e-5)
        assert normalizer(rollout).dtype == torch.float32


def test_normalised_observations_are_clipped_at_ten_on_both_sides():
    normalizer = ObservationNormalizer(Box(-np.inf, np.inf, (2,)))
    normalizer.update(moments(torch.tensor([[[1.0, 10.0]], [[3.0, 50.0]]])))  # means 2 and 30, deviations 1 and 20
    observations = torch.tensor([[2.0 + 9.5, 30.0 - 190.0], [2.0 + 10.5, 30.0 - 210.0], [1e9, -1e9]])
    assert_close(normalizer(observations), torch.tensor([[9.5, -9.5], [10, -10], [10, -10]]))


def test_an_observation_that_never_changed_is_divided_by_a_ten_thousandth():
    """The variance is 0, and 1e-8 is added to it before the root is taken."""
    normalizer = ObservationNormalizer(Box(-np.inf, np.inf, (2,)))
    seen = torch.tensor([0.5, -3.0]).expand(4, 2, 2)
    normalizer.update(moments(seen))
    steps = np.array([0, 2.0**-14, -(2.0**-12), 2.0**-9, -1.0, 1e9])[:, None]
    observations = np.array([0.5, -3.0]) + steps
    expected = np.clip((observations - [0.5, -3.0]) / np.sqrt(0 + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(torch.from_numpy(observations).float()), expected, rtol=1e-5)
    assert expected[:, 0].round(2).tolist() == [0, 0.61, -2.44, 10, -10, 10]


def test_before_the_first_update_observations_stay_as_they_are():
    normalizer = ObservationNormalizer(Box(-np.inf, np.inf, (2,)))
    observations = torch.tensor([[3.5, -9.0], [700.0, -1e9]])
    assert torch.equal(normalizer(observations), observations)
    assert normalizer.limit.tolist() == [np.inf, np.inf]
    normalizer.update(moments(observations[None]))
    assert normalizer.limit.tolist() == [10, 10]


def test_normalising_changes_no_statistics():
    normalizer = ObservationNormalizer(Box(-np.inf, np.inf, (4,)))
    normalizer.update(moments(stream(6, 3, 4)))
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    normalizer(stream(6, 3, 4, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in normalizer.state_dict().items())


def test_the_picture_in_a_dict_is_left_alone_and_the_vectors_around_it_are_normalised():
    space = Dict({"a": Box(-9, 9, (2,)), "b": Box(0, 255, (36, 40, 3), np.uint8), "c": Discrete(3)})
    normalizer = ObservationNormalizer(space)
    pixels = 36 * 40 * 3
    rollout = stream(8, 2, 2 + pixels + 3)
    normalizer.update(moments(rollout))
    normalized, flat = normalizer(rollout), rollout.double().numpy().reshape(16, -1)
    vectors = [0, 1, pixels + 2, pixels + 3, pixels + 4]
    assert torch.equal(normalized[..., 2 : pixels + 2], rollout[..., 2 : pixels + 2])
    expected = (flat - flat.mean(0)) / flat.std(0)
    np.testing.assert_allclose(normalized.reshape(16, -1)[:, vectors], expected[:, vectors], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: ObservationNormalizer(Box(-9, 9, (4,))), RewardNormalizer])
def test_restored_statistics_normalise_to_the_same_bits_and_go_on_from_there(make, tmp_path):
    normalizer, restored = make(), make()
    shape = (4,) if isinstance(normalizer, ObservationNormalizer) else ()
    normalizer.update(moments(stream(6, 3, *shape)))
    torch.save(normalizer.state_dict(), tmp_path / "state")
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(2):
        assert torch.equal(restored(stream(5, 3, *shape, seed=1)), normalizer(stream(5, 3, *shape, seed=1)))
        for each in (normalizer, restored):
            each.update(moments(stream(6, 3, *shape, seed=2)))


def test_rewards_are_divided_by_numpys_deviation_of_all_discounted_sums_so_far():
    """Where the sums come from is shown in tests/test_collector.py."""
    normalizer = RewardNormalizer()
    rollouts = [stream(length, 3, seed=length) for length in (8, 12)]
    for count, sums in enumerate(rollouts, start=1):
        normalizer.update(moments(sums[:, :2]) + moments(sums[:, 2:]))  # of two ranks
        deviation = torch.cat(rollouts[:count]).double().numpy().std()
        rewards = stream(5, 3, seed=1)
        np.testing.assert_allclose(normalizer(rewards), rewards.double().numpy() / deviation, rtol=1e-6)
        assert normalizer(rewards).dtype == torch.float32


def test_normalised_rewards_do_not_depend_on_the_scale_of_the_rewards_keep_their_sign_and_end_at_ten():
    rewards = stream(30, 2) + 30
    rewards[20, 1] = 1000.0
    normalized = []
    for scale in (1, 1000):
        normalizer = RewardNormalizer()
        normalizer.update(moments(scale * rewards.clamp(-3, 3)))
        normalized.append(normalizer(scale * rewards))
    assert_close(normalized[0], normalized[1], rtol=1e-5, atol=0)
    assert torch.equal(normalized[0].sign(), rewards.sign())
    assert normalized[0].max() == 10


@pytest.mark.parametrize("same", [0.0, 2.0**-12])
def test_rewards_whose_discounted_sums_never_changed_are_divided_by_a_ten_thousandth(same):
    """The variance is 0, and 1e-8 is added to it before the root is taken."""
    normalizer = RewardNormalizer()
    normalizer.update(moments(torch.full((6, 2), same)))
    rewards = np.array([[0, 2.0**-12], [-(2.0**-14), 2.0**-9], [-1.0, 1e9]])
    expected = np.clip(rewards / np.sqrt(0 + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(torch.from_numpy(rewards).float()), expected, rtol=1e-5)
    assert expected.round(2).tolist() == [[0, 2.44], [-0.61, 10], [-10, 10]]


@pytest.mark.parametrize("cut", [[8], [3, 5], [1, 1, 6]])
def test_advantages_are_normalised_by_numpys_mean_and_deviation_over_all_ranks(cut):
    whole = stream(16, 8)
    parts = whole.split(cut, dim=1)
    total = sum(moments(part) for part in parts)
    normalized = torch.cat([normalize_advantages(part, total) for part in parts], dim=1)
    exact = whole.double().numpy()
    np.testing.assert_allclose(normalized, (exact - exact.mean()) / exact.std(), rtol=1e-6)
    assert normalized.dtype == torch.float32


def test_equal_advantages_become_zero():
    equal = torch.full((4, 4), 2.5)
    assert torch.equal(normalize_advantages(equal, moments(equal)), torch.zeros(4, 4))
