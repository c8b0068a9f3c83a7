"""Rows of two sides against every way to pack a few examples, and against a search of all pairs without any blocks."""

import numpy as np
import pytest

from megatron_xmtf.data import two_sided_fit
from megatron_xmtf.data.two_sided_fit import fewest_rows, pack_two_sided, two_sided_patterns
from megatron_xmtf.errors import DatasetError


def counts_of(pairs, encoder_length, decoder_length):
    counts = np.zeros((encoder_length + 1, decoder_length + 1), np.int64)
    for pair in pairs:
        counts[tuple(pair)] += 1
    return counts


def pack(pairs, encoder_length, decoder_length, seed=0):
    pairs = np.array(pairs)
    offsets, order = pack_two_sided(
        pairs[:, 0], pairs[:, 1], encoder_length=encoder_length, decoder_length=decoder_length, seed=seed
    )
    return [order[begin:end].tolist() for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]


def optimum(pairs, encoder_length, decoder_length):
    """The fewest rows, by trying every row, and one new row, for one example after the other."""
    best = len(pairs)

    def place(number, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(pairs):
            best = len(rooms)
            return
        inputs, targets = pairs[number]
        for room in sorted(set(rooms)):
            if room[0] >= inputs and room[1] >= targets:
                others = list(rooms)
                others.remove(room)
                place(number + 1, [*others, (room[0] - inputs, room[1] - targets)])
        place(number + 1, [*rooms, (encoder_length - inputs, decoder_length - targets)])

    place(0, [])
    return best


def test_the_worked_example():
    pairs = [(6, 1), (4, 3), (3, 2), (6, 1), (4, 3)]
    rows = [sorted(pairs[number] for number in row) for row in pack(pairs, 10, 4)]
    assert sorted(rows) == [[(3, 2)], [(4, 3), (6, 1)], [(4, 3), (6, 1)]]


@pytest.mark.parametrize("seed", range(12))
def test_against_every_way_to_pack(seed):
    random = np.random.default_rng(seed)
    pairs = [tuple(pair) for pair in np.stack([random.integers(1, 9, 8), random.integers(1, 6, 8)], 1).tolist()]
    found, best = len(pack(pairs, 12, 7)), optimum(pairs, 12, 7)
    assert fewest_rows(counts_of(pairs, 12, 7)) <= best <= found <= best + 1


@pytest.mark.parametrize("sampled", [two_sided_fit.SAMPLED, 2000])
def test_rows_that_were_cut_up_are_found_again(sampled, monkeypatch):
    """Full rows, cut: a few examples with most of the targets, many short ones with half of the inputs.

    Nearness alone fills the targets of its first rows, and ends with short inputs whose targets fill no row.
    """
    monkeypatch.setattr(two_sided_fit, "SAMPLED", sampled)
    random, pairs = np.random.default_rng(0), []
    for _ in range(400):
        few, many = random.integers(2, 6), random.integers(8, 20)
        for pieces, (inputs, targets) in ((few, (256, 104)), (many, (256, 24))):
            sides = [
                1 + np.floor(random.dirichlet([2.0] * pieces) * (side - pieces)).astype(int)
                for side in (inputs, targets)
            ]
            pairs += zip(*(side.tolist() for side in sides), strict=True)
    counts = counts_of(pairs, 512, 128)
    rows, near = (sum(pattern.rows for pattern in two_sided_patterns(counts, *args)) for args in ((), ([0.0],)))
    assert fewest_rows(counts) <= rows <= 400 < near


def test_the_bound_sees_more_than_the_sum_of_lengths():
    # Three inputs of more than half a row need three rows, though 6 + 6 + 6 tokens would fill two.
    assert fewest_rows(counts_of([(6, 1)] * 3, 10, 8)) == 3
    assert fewest_rows(counts_of([(2, 3)] * 3, 10, 8)) == 2


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [(100, 40), (64, 200), (33, 9)])
def test_blocks_find_the_nearest_pair(lengths, balance):
    """The same rule, without blocks: each time every pair that is left is looked at."""
    random = np.random.default_rng(sum(lengths))
    inputs = np.clip(random.lognormal(2.5, 1, 400).astype(int), 1, lengths[0])
    targets = np.clip(random.lognormal(1.2, 1, 400).astype(int), 1, lengths[1])
    counts = counts_of(zip(inputs, targets, strict=True), *lengths)
    left = {(int(i), int(t)): int(counts[i, t]) for i, t in zip(*counts.nonzero(), strict=True)}
    expected = []
    while left:
        asked = [sum(pair[side] * count for pair, count in left.items()) / lengths[side] for side in (0, 1)]
        weights = [asked[side] / max(asked) for side in (0, 1)]
        room, row, available = list(lengths), [], dict(left)
        while fitting := [pair for pair in available if pair[0] <= room[0] and pair[1] <= room[1]]:
            distances = {}
            for pair in fitting:
                leaves = [(room[side] - pair[side]) / lengths[side] for side in (0, 1)]
                imbalance = (leaves[0] - leaves[1]) - (weights[1] - weights[0])
                distances[pair] = sum(weights[side] * leaves[side] ** 2 for side in (0, 1)) + balance * imbalance**2
            pair = min(distances, key=distances.__getitem__)
            row.append(pair)
            room = [room[0] - pair[0], room[1] - pair[1]]
            available[pair] -= 1
            if not available[pair]:
                del available[pair]
        rows = min(left[pair] // row.count(pair) for pair in row)
        expected.append((rows, sorted(row)))
        for pair in row:
            left[pair] -= rows
        left = {pair: count for pair, count in left.items() if count}
    width = lengths[1] + 1
    patterns = [
        (pattern.rows, sorted(divmod(code, width) for code in pattern.lengths))
        for pattern in two_sided_patterns(counts, [balance])
    ]
    assert patterns == expected


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_every_example_is_in_one_row_and_no_side_overflows(count):
    random = np.random.default_rng(count)
    pairs = np.stack([random.integers(1, 129, count), random.integers(1, 33, count)], 1)
    rows = pack(pairs, 128, 32)
    assert sorted(number for row in rows for number in row) == list(range(count))
    assert all((pairs[row].sum(axis=0) <= (128, 32)).all() for row in rows)
    assert len(rows) >= fewest_rows(counts_of(pairs, 128, 32))


def test_same_seed_same_bytes_and_length_does_not_order_rows():
    random = np.random.default_rng(5)
    pairs = np.stack([random.integers(1, 65, 4000), random.integers(1, 17, 4000)], 1)
    first, again, other = (pack(pairs, 64, 16, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    means = [pairs[row, 0].mean() for row in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (11, 1), (1, 5)])
def test_lengths_that_no_row_can_hold_are_an_error(pair):
    with pytest.raises(DatasetError, match="a row holds 1 to"):
        pack([(3, 2), pair], 10, 4)


def test_nothing_to_pack():
    assert pack(np.zeros((0, 2), int), 10, 4) == []
