"""Noise masks against counts by hand, brute force over all masks, and closed forms of the distributions."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_xmtf.data.objectives.counter_random import (
    chunk_key,
    chunk_keys,
    key_of,
    occurrence_key,
    random_bits,
    uniforms,
)
from megatron_xmtf.data.objectives.spans import noise_spans, noise_tokens, poisson_lengths, poisson_spans, random_spans


def runs(mask):
    """Return the lengths of the runs of noise."""
    return [len(list(group)) for is_noise, group in itertools.groupby(mask.tolist()) if is_noise]


def chi_square(observed, expected):
    return sum((observed.get(key, 0) - count) ** 2 / count for key, count in expected.items())


def test_numbers_of_noise_tokens_and_spans_are_those_of_t5():
    # By hand: round(0.15 n) to even, at least 1, at most n - 1; spans round(noise / 3), at least 1.
    lengths = np.array([0, 1, 2, 3, 10, 13, 30, 50, 100, 512, 568])
    noise = noise_tokens(lengths, density=0.15)
    assert noise.tolist() == [0, 0, 1, 1, 2, 2, 4, 8, 15, 77, 85]
    assert noise_spans(noise, lengths, mean_length=3.0).tolist() == [0, 0, 1, 1, 1, 1, 1, 3, 5, 26, 28]


@pytest.mark.parametrize("density", [0.15, 0.5, 0.05])
@pytest.mark.parametrize("mean", [1.0, 3.0, 32.0])
def test_t5_masks_have_the_counts_and_alternate(density, mean):
    for length in [*range(2, 40), 100, 513]:
        whole = np.array([length])
        noise = noise_tokens(whole, density=density)
        spans = noise_spans(noise, whole, mean_length=mean)
        for key in range(3):
            mask = random_spans(length, density=density, mean_length=mean, key=key)
            assert len(mask) == length
            assert (mask.sum(), len(runs(mask))) == (noise[0], spans[0])
            assert not mask[0] and mask[-1], "T5's masks begin with a token that is kept and end with noise"


def test_every_mask_that_t5_allows_is_equally_likely():
    # 9 tokens, 4 of noise in 2 spans: 4 others in front in 2 spans of their own, 3 * 4 = 12 masks.
    length, density, mean = 9, 0.45, 2.0
    allowed = {
        mask
        for mask in itertools.product([False, True], repeat=length)
        if sum(mask) == 4 and not mask[0] and mask[-1] and len(runs(np.array(mask))) == 2
    }
    assert len(allowed) == 12
    draws = 12000
    seen = Counter(
        tuple(random_spans(length, density=density, mean_length=mean, key=key_of(key)).tolist()) for key in range(draws)
    )
    assert set(seen) == allowed
    assert chi_square(seen, dict.fromkeys(allowed, draws / 12)) < 31.3, "99.9 % of chi-square with 11 degrees"


def test_poisson_lengths_follow_the_distribution_without_zero():
    rate, lengths = 3.0, Counter()
    for key in range(600):
        drawn = poisson_lengths(120, rate=rate, bits=random_bits(key_of("lengths", key), 120))
        assert drawn.sum() == 120 and drawn.min() >= 1
        lengths.update(drawn[:20].tolist())  # 20 spans of 120 tokens are never the last one at rate 3, but by a miracle
    total = sum(lengths.values())
    probability = {k: math.exp(-rate) * rate**k / math.factorial(k) / (1 - math.exp(-rate)) for k in range(1, 9)}
    expected = {k: total * p for k, p in probability.items()}
    observed = {k: lengths[k] for k in expected}
    assert total == 12000
    assert chi_square(observed, expected) < 26.1, "99.9 % of chi-square with 8 degrees: 1 to 8, and longer"
    mean = sum(k * n for k, n in lengths.items()) / total
    assert mean == pytest.approx(rate / (1 - math.exp(-rate)), rel=0.02), "3.157"


def test_poisson_masks_have_the_exact_share_and_kept_tokens_between_spans():
    for length in [*range(2, 60), 1000]:
        for density in (0.15, 0.5):
            wanted = int(noise_tokens(np.array([length]), density=density)[0])
            for key in range(4):
                mask = poisson_spans(length, density=density, rate=3.0, key=key_of(length, key))
                assert (len(mask), int(mask.sum())) == (length, wanted)


def test_every_arrangement_of_poisson_spans_is_equally_likely():
    # 6 tokens, 3 of noise, rate so large that it is one span: it lies before 0, 1, 2 or 3 kept tokens.
    draws = 8000
    seen = Counter(
        int(np.argmax(poisson_spans(6, density=0.5, rate=60.0, key=key_of("places", key)))) for key in range(draws)
    )
    assert set(seen) == {0, 1, 2, 3}
    assert chi_square(seen, dict.fromkeys(range(4), draws / 4)) < 16.3, "99.9 % of chi-square with 3 degrees"


def test_every_position_is_dropped_as_often_as_another():
    length, draws = 40, 6000
    dropped = sum(
        poisson_spans(length, density=0.15, rate=3.0, key=key_of("positions", key)).astype(int) for key in range(draws)
    )
    assert dropped.sum() == draws * 6, "round(0.15 * 40)"
    # Spans lie inside the text, so the first and last tokens are in fewer of them; the middle is even.
    middle = dropped[8:-8] / draws
    assert middle.max() - middle.min() < 0.04
    assert abs(dropped[:8].sum() - dropped[-8:].sum()) / draws < 0.06, "neither end is preferred"


def test_random_numbers_follow_from_key_and_place_alone():
    # splitmix64 of seed 1234567, as published with the algorithm: the first three outputs.
    assert random_bits(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(7, 10)[:4].tolist() == random_bits(7, 4).tolist()
    assert chunk_keys(np.array([5], np.uint64), key=9)[0] == chunk_keys(np.arange(10, dtype=np.uint64), key=9)[5]
    alone = [chunk_key(number, key=2**64 - 5) for number in (0, 7, 2**40)]
    assert alone == chunk_keys(np.array([0, 7, 2**40], np.uint64), key=2**64 - 5).tolist()
    keys = {occurrence_key(chunk, place) for chunk in range(50) for place in range(50)}
    assert len(keys) == 2500
    assert key_of("a", 1) != key_of("a", "1") != key_of("a1")
    numbers = uniforms(random_bits(3, 20000))
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = Counter((numbers * 10).astype(int).tolist())
    assert chi_square(counts, dict.fromkeys(range(10), 2000)) < 27.9, "99.9 % of chi-square with 9 degrees"
