import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data import rounds
from megatron_xmtf.data.rounds import Rounds, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097, 70_001])
def test_an_order_has_every_element_once(size):
    orders = [permuted(np.arange(size), size, seed=seed) for seed in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(size))
    if size > 10:
        assert not np.array_equal(*orders)
    some = np.random.default_rng(0).integers(size, size=20)
    assert np.array_equal(permuted(some, size, seed=0), orders[0][some])


def test_an_order_is_near_to_random():
    """Means of many places and the first place over many seeds, within five standard deviations of uniform."""
    size = 100_000
    order = permuted(np.arange(size), size, seed=3)
    deviation = size / np.sqrt(12)
    for block in np.split(order, 100):
        assert abs(block.mean() - size / 2) < 5 * deviation / np.sqrt(1000)
    firsts = np.array([permuted(np.zeros(1, int), size, seed=seed)[0] for seed in range(400)])
    assert abs(firsts.mean() - size / 2) < 5 * deviation / 20
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 5 / np.sqrt(size)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 100), min_size=1, max_size=12), st.booleans())
def test_no_example_twice_in_a_draw_nor_twice_more_often_in_all(size, counts, large):
    # The path for large components, which computes its orders, is the same for small ones.
    small, rounds.SMALL = rounds.SMALL, 0 if large else rounds.SMALL
    try:
        source = Rounds(size, seed=(1, 2))
        times = np.zeros(size, int)
        for count in counts:
            drawn = source.draw(count)
            assert len(drawn) == count
            here = np.bincount(drawn, minlength=size)
            if count <= size:
                assert here.max() <= 1
            times += here
            assert times.max() - times.min() <= 1
        assert source.drawn == sum(counts)
    finally:
        rounds.SMALL = small


def test_draws_follow_the_seed_and_rounds_differ():
    def draws(seed):
        source = Rounds(100, seed=seed)
        return [source.draw(30).tolist() for _ in range(7)]

    assert draws((1,)) == draws((1,)) != draws((2,))
    assert draws((1,))[0] != draws((1,))[3]
