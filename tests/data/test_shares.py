import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data.shares import Floor, ShareNode, pass_quotas, share_counts, wanted_shares
from megatron_xmtf.errors import ConfigError


def group(*children, **fields):
    return ShareNode(children=list(children), **fields)


def leaf(size, **fields):
    return ShareNode(size=size, **fields)


def unlimited(root):
    return np.full(len(root.leaves()), np.inf)


def test_shares_by_largest_remainder():
    assert share_counts(10, [1, 3]) == [3, 7]
    assert share_counts(100, [0.3924620202, 0.0797519865, 0.0652]) == [73, 15, 12]
    assert share_counts(7, [1, 1, 1]) == [3, 2, 2]
    assert share_counts(5, [1e-12, 1]) == [0, 5]


@pytest.mark.parametrize("seed", range(20))
def test_counts_add_up_and_are_less_than_one_off(seed):
    random = np.random.default_rng(seed)
    weights, total = random.random(int(random.integers(1, 50))) + 1e-6, int(random.integers(0, 10**6))
    shares = share_counts(total, weights.tolist())
    assert sum(shares) == total
    assert np.all(np.abs(np.array(shares) - total * weights / weights.sum()) < 1 + 1e-6)


def test_the_worked_example():
    root = group(group(leaf(90_000, cap=30_000), leaf(10_000), weight=3), leaf(5_000, weight=1))
    assert wanted_shares(root).tolist() == pytest.approx([9 / 16, 3 / 16, 4 / 16])


def test_flan_2021_mixing_rate_maximum():
    """Proportional mixing with a maximum of 3,000: r_m = min(e_m, K) / sum of min(e_n, K) (T5, section 3.5.2)."""
    sizes = [30_000, 2_500, 250, 9_000]
    root = group(*(leaf(size, cap=3_000) for size in sizes))
    capped = np.minimum(sizes, 3_000)
    assert wanted_shares(root).tolist() == pytest.approx((capped / capped.sum()).tolist())
    assert pass_quotas(root, unlimited(root)).tolist() == pytest.approx(capped.tolist())


def test_temperature_is_that_of_multilingual_bert():
    """p_i ~ n_i ** (1/T) (mT5, section 3.1: alpha = 1/T)."""
    sizes = np.array([1e6, 1e4, 100.0])
    root = group(*(leaf(size) for size in sizes), temperature=1 / 0.3)
    assert wanted_shares(root).tolist() == pytest.approx((sizes**0.3 / (sizes**0.3).sum()).tolist())


def test_without_rules_a_pass_is_every_example_once():
    sizes = [3.0, 7.0, 11.0, 1_000_003.0]
    root = group(*(leaf(size) for size in sizes))
    quotas = pass_quotas(root, unlimited(root))
    assert share_counts(round(quotas.sum()), quotas.tolist()) == sizes


def test_a_cap_on_a_group_bounds_the_group():
    root = group(group(leaf(600), leaf(200), cap=100), leaf(100))
    assert wanted_shares(root).tolist() == pytest.approx([0.375, 0.125, 0.5])


def test_a_pass_stops_where_a_component_is_used_up():
    root = group(leaf(100, weight=1), leaf(900, weight=1))
    # Equal parts, but the first has 150 draws left: the pass is 300 long and holds the wanted parts.
    assert pass_quotas(root, np.array([150.0, np.inf]), shortest=600).tolist() == pytest.approx([150, 150])
    # Used up: the other takes all.
    assert pass_quotas(root, np.array([0.0, np.inf])).tolist() == pytest.approx([0, 900])
    assert pass_quotas(root, np.array([0.0, 0.0])).tolist() == [0, 0]


def test_a_pass_stops_before_an_example_comes_twice():
    root = group(leaf(100, weight=1), leaf(900, weight=1))
    everything = np.array([np.inf, np.inf])
    assert pass_quotas(root, everything).tolist() == pytest.approx([100, 100])
    # Too few to fill some rows: then some come twice.
    assert pass_quotas(root, everything, shortest=600).tolist() == pytest.approx([300, 300])
    assert pass_quotas(root, everything, shortest=9999).tolist() == pytest.approx([500, 500])


def test_what_one_cannot_take_goes_to_its_nearest_relatives():
    root = group(group(leaf(500), leaf(500), weight=1), leaf(500, weight=1))
    quotas = pass_quotas(root, np.array([1.0, np.inf, np.inf]))
    # A pass is never shorter than 1/64 of the whole: 1500 / 64 = 23.4, half of it for the group.
    assert quotas.sum() == pytest.approx(1500 / 64)
    assert quotas[0] == 1 and quotas[0] + quotas[1] == pytest.approx(quotas[2])


def test_floors_raise_and_the_rest_keep_their_proportions():
    root = group(leaf(800), leaf(190), leaf(10))
    floor = Floor("sw", np.array([2]), 0.1)
    shares = wanted_shares(root, [floor])
    assert shares.tolist() == pytest.approx([0.9 * 800 / 990, 0.9 * 190 / 990, 0.1])


def test_overlapping_floors_are_all_met():
    root = group(*(leaf(size) for size in (1000, 1000, 5, 5)))
    floors = [Floor("sw", np.array([2]), 0.1), Floor("nli", np.array([2, 3]), 0.3), Floor("th", np.array([3]), 0.05)]
    shares = wanted_shares(root, floors)
    assert shares.sum() == pytest.approx(1)
    for floor in floors:
        assert shares[floor.leaves].sum() >= floor.fraction * (1 - 1e-6)


def test_floors_that_ask_for_too_much_are_an_error():
    root = group(leaf(10), leaf(10))
    with pytest.raises(ConfigError, match="floors cannot all be met"):
        wanted_shares(root, [Floor("a", np.array([0]), 0.7), Floor("b", np.array([1]), 0.7)])


def test_max_epochs_wins_over_a_floor():
    root = group(leaf(1000), leaf(10))
    quotas = pass_quotas(root, np.array([np.inf, 10.0]), [Floor("sw", np.array([1]), 0.5)])
    assert quotas[1] <= 10


trees = st.recursive(
    st.builds(
        lambda size, weight, cap: ShareNode(size=size, weight=weight, cap=cap),
        st.integers(1, 10**6).map(float),
        st.floats(0.01, 100),
        st.none() | st.floats(1, 1e6),
    ),
    lambda children: st.builds(
        lambda nodes, weight, temperature: ShareNode(children=nodes, weight=weight, temperature=temperature),
        st.lists(children, min_size=1, max_size=4),
        st.floats(0.01, 100),
        st.floats(0.5, 10),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(root=trees, data=st.data())
def test_quotas_stay_within_limits_and_groups_keep_their_parts(root, data):
    count = len(root.leaves())
    limits = np.array(data.draw(st.lists(st.floats(0, 1e6) | st.just(np.inf), min_size=count, max_size=count)))
    quotas = pass_quotas(root, limits)
    assert np.all(quotas >= 0) and np.all(quotas <= limits * (1 + 1e-9))
    whole = root.counted_size()
    assert quotas.sum() <= whole * (1 + 1e-9)
    if not limits.any():
        assert quotas.sum() == 0
    elif quotas.sum() < whole / 64 * (1 - 1e-9):
        assert quotas == pytest.approx(limits)  # shorter only when there is no more
    shares = wanted_shares(root)
    assert shares.sum() == pytest.approx(1)
    if np.isinf(limits).all():
        assert quotas / quotas.sum() == pytest.approx(shares)
        assert pass_quotas(root, limits, shortest=whole) == pytest.approx(shares * whole)
