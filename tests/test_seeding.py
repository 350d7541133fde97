from itertools import product

import numpy as np

from rl.seeding import Purpose, stream, stream_seed


def test_a_stream_is_a_function_of_its_arguments():
    for arguments in [(42, Purpose.NETWORK), (42, Purpose.ACTION, 3, 1)]:
        np.testing.assert_array_equal(stream(*arguments).random(100), stream(*arguments).random(100))


def test_drawing_from_a_stream_does_not_move_another():
    expected = stream(0, Purpose.SHUFFLE, 1).random(10)
    other, this = stream(0, Purpose.ACTION, 1), stream(0, Purpose.SHUFFLE, 1)
    other.random(1000)
    np.testing.assert_array_equal(this.random(10), expected)


def test_streams_differ_by_seed_purpose_and_index():
    indices = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (12,), (0, 0, 1)]
    arguments = [(seed, purpose, *index) for seed, purpose, index in product((0, 1, 2**32 - 1), Purpose, indices)]
    assert len({stream(*a).integers(2**63) for a in arguments}) == len(arguments)
    assert len({stream_seed(*a) for a in arguments}) == len(arguments)


def test_different_streams_are_uncorrelated():
    numbers = np.stack([stream(seed, purpose, 1).standard_normal(10_000) for seed in (0, 1) for purpose in Purpose])
    correlations = np.corrcoef(numbers)[np.triu_indices(len(numbers), k=1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(10_000)  # five standard deviations


def test_seeds_are_plain_numbers_from_the_whole_range_that_gymnasium_and_torch_take():
    seeds = [stream_seed(2**32 - 1, Purpose.ENVIRONMENT, index) for index in range(200)]
    assert {type(seed) for seed in seeds} == {int}
    assert 0 <= min(seeds) < 0.05 * 2**31
    assert 0.95 * 2**31 < max(seeds) < 2**31


def test_purposes_keep_their_numbers_because_published_results_rest_on_them():
    assert list(Purpose.__members__)[:6] == ["NETWORK", "ENVIRONMENT", "ACTION", "SHUFFLE", "SCATTER", "TEST"]
    assert [*Purpose][:6] == [0, 1, 2, 3, 4, 5]
