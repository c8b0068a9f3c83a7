import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data import best_fit
from megatron_xmtf.data.best_fit import best_fit_patterns, gather, group, number_type, pack_lengths
from megatron_xmtf.errors import DatasetError


def lognormal_lengths(count, capacity, seed=0, mean=200):
    """Lengths with the long tail of instruction data; sigma 1 puts the median at 0.6 of the mean."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(np.rint(draws), 1, capacity).astype(np.int32)


def row_sums(lengths, row_offsets, order):
    return np.add.reduceat(lengths[order].astype(np.int64), row_offsets[:-1])


def best_fit_decreasing(lengths, capacity):
    """Oracle: best-fit decreasing, one example at a time, by trying every row. Returns used tokens of each row."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=120)), capacity


def test_the_worked_example():
    counts = np.bincount([7, 7, 6, 4, 3, 3, 2], minlength=11)
    patterns = best_fit_patterns(counts, capacity=10)
    assert sorted((tuple(p.lengths), p.rows) for p in patterns) == [((2,), 1), ((6, 4), 1), ((7, 3), 2)]


@settings(max_examples=300, deadline=None)
@given(lengths_and_capacity(), st.integers(0, 2**32), st.sampled_from([np.uint16, np.int32, np.int64]))
def test_rows_are_those_of_best_fit_decreasing_example_by_example(case, seed, dtype):
    values, capacity = case
    lengths = np.array(values, dtype)
    row_offsets, order = pack_lengths(lengths, capacity=capacity, seed=seed)
    assert sorted(order.tolist()) == list(range(len(values)))  # every example exactly once
    assert row_offsets[0] == 0 and row_offsets[-1] == len(values) and np.all(np.diff(row_offsets) >= 1)
    sums = row_sums(lengths, row_offsets, order)
    assert sums.max() <= capacity
    assert sorted(sums) == sorted(best_fit_decreasing(values, capacity))


@settings(max_examples=100, deadline=None)
@given(lengths_and_capacity())
def test_bounds_on_the_number_of_rows(case):
    """No fewer rows than the volume asks for; and no two rows that could be one, so fewer than twice the volume."""
    values, capacity = case
    lengths = np.array(values)
    row_offsets, order = pack_lengths(lengths, capacity=capacity, seed=0)
    sums = np.sort(row_sums(lengths, row_offsets, order))
    assert len(sums) >= -(-sum(values) // capacity)
    assert len(sums) == 1 or sums[0] + sums[1] > capacity
    assert len(sums) <= 2 * sum(values) / capacity + 1


@settings(max_examples=50, deadline=None)
@given(lengths_and_capacity(), st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_one_seed_one_result(case, seed):
    values, capacity = case
    one, other = (pack_lengths(np.array(values), capacity=capacity, seed=seed) for _ in range(2))
    assert one[0].tobytes() == other[0].tobytes() and one[1].tobytes() == other[1].tobytes()
    narrow = pack_lengths(np.array(values, np.uint16), capacity=capacity, seed=seed)
    assert narrow[0].tobytes() == one[0].tobytes() and narrow[1].tobytes() == one[1].tobytes()


def test_another_seed_gives_another_order_of_as_many_rows():
    lengths = lognormal_lengths(3_000, 257, mean=60)
    one, other = (pack_lengths(lengths, capacity=257, seed=seed) for seed in (5, 6))
    assert not np.array_equal(one[1], other[1])
    assert len(one[0]) == len(other[0])


def test_the_caller_s_lengths_are_not_changed():
    lengths = lognormal_lengths(1_000, 257).astype(np.uint16)
    before = lengths.copy()
    pack_lengths(lengths, capacity=257, seed=0)
    assert np.array_equal(lengths, before)


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 19])
def test_every_example_once_whatever_the_size_of_a_block(monkeypatch, block):
    monkeypatch.setattr(best_fit, "BLOCK", block)
    lengths = lognormal_lengths(700, 513, mean=100)
    row_offsets, order = pack_lengths(lengths, capacity=513, seed=3)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    sums = row_sums(lengths, row_offsets, order)
    assert sums.max() <= 513 and sorted(sums) == sorted(best_fit_decreasing(lengths.tolist(), 513))


def test_more_examples_than_a_block_holds():
    lengths = lognormal_lengths(3 * best_fit.BLOCK // 2, 513, mean=20)
    row_offsets, order = pack_lengths(lengths, capacity=513, seed=3)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert row_sums(lengths, row_offsets, order).max() <= 513


def test_fill_on_realistic_lengths():
    lengths = lognormal_lengths(100_000, 2049)
    row_offsets, _ = pack_lengths(lengths, capacity=2049, seed=0)
    rows = len(row_offsets) - 1
    assert lengths.sum() / (rows * 2049) >= 0.999
    assert rows >= -(-int(lengths.sum()) // 2049)


def test_capacity_beyond_16_bits():
    lengths = np.array([70_000, 30_000, 40_000, 60_000, 100_000])
    row_offsets, order = pack_lengths(lengths, capacity=100_000, seed=0)
    assert row_sums(lengths, row_offsets, order).tolist() == [100_000] * 3


def test_length_orders_neither_rows_nor_segments():
    lengths = lognormal_lengths(50_000, 2049)
    row_offsets, order = pack_lengths(lengths, capacity=2049, seed=0)
    packed, segments = lengths[order], np.diff(row_offsets)
    halves = segments[: len(segments) // 2].mean() / segments[len(segments) // 2 :].mean()
    assert 0.9 < halves < 1.1
    multiple = np.flatnonzero(segments > 1)
    first, last = packed[row_offsets[multiple]], packed[row_offsets[multiple + 1] - 1]
    assert 0.45 < np.mean(first > last) / np.mean(first != last) < 0.55
    # Equal lengths do not stay in their order in the file.
    same = order[packed == 100].astype(np.int64)
    assert len(same) > 100 and 0.4 < np.mean(np.diff(same) > 0) < 0.6


def test_an_example_is_as_likely_in_any_part_of_the_order():
    """Chi-squared over 16 x 16 cells of (part of the file, part of the order): 225 degrees of freedom."""
    lengths = lognormal_lengths(64_000, 513, mean=50)
    _, order = pack_lengths(lengths, capacity=513, seed=1)
    cells = np.histogram2d(np.arange(len(order)), order, bins=16)[0]
    expected = len(order) / 256
    assert np.sum((cells - expected) ** 2) / expected < 225 + 5 * np.sqrt(2 * 225)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11], [-1]])
def test_lengths_that_no_row_holds_are_refused(lengths):
    with pytest.raises(DatasetError, match="a row holds 1 to 10"):
        pack_lengths(np.array(lengths), capacity=10, seed=0)


def test_nothing_to_pack_is_no_row():
    row_offsets, order = pack_lengths(np.zeros(0, np.int64), capacity=10, seed=0)
    assert row_offsets.tolist() == [0] and len(order) == 0


def test_numbers_take_32_bits_as_long_as_they_fit():
    assert [number_type(count) for count in (0, 2**32, 2**32 + 1)] == [np.uint32, np.uint32, np.int64]
    assert np.iinfo(np.uint32).max == 2**32 - 1  # the number of the last of 2**32


def test_gather_is_indexing(monkeypatch):
    values = np.array([7, 8, 9], np.uint16)
    numbers = np.array([2, 0, 0, 1, 2], np.uint32)
    for block in (1, 2, 5, 100):
        monkeypatch.setattr(best_fit, "BLOCK", block)
        found = gather(values, numbers)
        assert found.dtype == np.uint16 and found.tolist() == [9, 7, 7, 8, 9]
    with pytest.raises(IndexError):
        gather(values, np.array([3], np.uint32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([1, 7, 1 << 19]))
def test_group_is_a_stable_sort_by_key(keys, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "BLOCK", block)
        values = np.arange(len(keys), dtype=np.int64) * 3
        grouped, ends = group(np.array(keys, np.uint16), num_keys=10, values=values)
        numbers, _ = group(np.array(keys, np.uint16), num_keys=10)
    expected = sorted(range(len(keys)), key=lambda at: keys[at])
    assert grouped.tolist() == [3 * at for at in expected] and numbers.tolist() == expected
    assert ends.tolist() == [sum(one <= key for one in keys) for key in range(10)]
