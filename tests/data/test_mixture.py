import numpy as np
import pytest

from megatron_xmtf.data.mixture import epoch_examples, share_counts


def test_shares_by_largest_remainder():
    assert share_counts(10, [1, 3]) == [3, 7]
    assert share_counts(100, [0.3924620202, 0.0797519865, 0.0652]) == [73, 15, 12]
    assert share_counts(7, [1, 1, 1]) == [3, 2, 2]
    assert share_counts(5, [1e-12, 1]) == [0, 5]


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_and_are_less_than_one_off(seed):
    random = np.random.default_rng(seed)
    weights, total = random.random(int(random.integers(1, 50))) + 1e-6, int(random.integers(0, 10**6))
    shares = share_counts(total, weights.tolist())
    assert sum(shares) == total
    assert np.all(np.abs(np.array(shares) - total * weights / weights.sum()) < 1 + 1e-6)


def test_without_weights_every_example_once_an_epoch():
    for epoch in range(2):
        chosen = epoch_examples([3, 0, 5], weights=None, seed=1, epoch=epoch)
        assert [positions.tolist() for positions in chosen] == [[0, 1, 2], [], [0, 1, 2, 3, 4]]


def test_an_epoch_has_as_many_examples_as_the_datasets_hold():
    chosen = epoch_examples([6, 4], weights=[1, 3], seed=1, epoch=0)
    assert [len(positions) for positions in chosen] == [3, 7]
    assert len(set(chosen[0].tolist())) == 3
    assert sorted(np.bincount(chosen[1], minlength=4).tolist()) == [1, 2, 2, 2]


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], [1, 40]])
def test_over_a_run_no_example_is_drawn_twice_more_often_than_another(weights):
    times = [np.zeros(11, int), np.zeros(30, int)]
    for epoch in range(9):
        for drawn, positions in zip(times, epoch_examples([11, 30], weights=weights, seed=4, epoch=epoch), strict=True):
            drawn += np.bincount(positions, minlength=len(drawn))
            assert drawn.max() - drawn.min() <= 1


def test_the_choice_follows_seed_and_epoch():
    def choice(seed, epoch):
        return epoch_examples([1000, 10], weights=[1, 1], seed=seed, epoch=epoch)[0].tolist()

    assert choice(1, 0) == choice(1, 0)
    assert choice(1, 0) != choice(2, 0) and choice(1, 0) != choice(1, 1)
