"""Which tokens of a document are noise: spans by T5's rule, and spans of Poisson lengths.

    random_spans       length 12, density 0.25, mean span 1.5: 3 tokens of noise in 2 spans, 9 others in 2 spans
      tokens           a  b  c  d  e  f  g  h  i  j  k  l
      noise            .  .  .  .  X  .  .  .  .  .  X  X      spans alternate; the first is not noise, the last one is
    poisson_spans      the same 3 tokens of noise; lengths drawn 2 1, put anywhere, none next to another
      noise            X  .  .  .  .  X  X  .  .  .  .  .

The number of tokens and, for T5, of spans follow from the length alone, so the lengths of inputs and targets do too.
Invariant: a mask of n >= 2 tokens has exactly `noise_tokens(n)` of noise, which is 1 to n - 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.objectives.counter_random import random_bits, uniforms

__all__ = ["noise_spans", "noise_tokens", "poisson_lengths", "poisson_spans", "random_spans"]

Ints = NDArray[np.int64]


def noise_tokens(lengths: Ints, *, density: float) -> Ints:
    """Return how many tokens are noise: density times the length, rounded to even in float32, from 1 to length - 1.

    Args:    lengths: int64 [n], tokens of documents; below 2 there is no such number, and 0 is returned.
    Source:  t5.data.preprocessors `random_spans_noise_mask`, whose arithmetic is float32.
    """
    wanted = np.rint(lengths.astype(np.float32) * np.float32(density)).astype(np.int64)
    return np.where(lengths < 2, 0, np.minimum(np.maximum(wanted, 1), lengths - 1))


def noise_spans(noise: Ints, lengths: Ints, *, mean_length: float) -> Ints:
    """Return how many spans of noise T5's rule makes: noise / mean_length, rounded; at least 1.

    Never more than there are tokens of noise, or of the rest, since no span is empty; 0 where there is no noise.
    """
    wanted = np.rint(noise.astype(np.float32) / np.float32(mean_length)).astype(np.int64)
    return np.where(noise == 0, 0, np.minimum(np.maximum(wanted, 1), np.minimum(noise, lengths - noise)))


def random_spans(length: int, *, density: float, mean_length: float, key: int) -> NDArray[np.bool_]:
    """Draw T5's noise mask, bool [length]; all masks that its rule allows are equally likely.

    Args:    length: at least 2. key: of `counter_random`.
    Source:  t5.data.preprocessors `random_spans_noise_mask`.
    """
    whole = np.array([length], np.int64)
    noise = noise_tokens(whole, density=density)
    spans = int(noise_spans(noise, whole, mean_length=mean_length)[0])
    num_noise = int(noise[0])
    bits = random_bits(key, length - 2)
    kept = _segments(length - num_noise, spans, bits[: length - num_noise - 1])
    dropped = _segments(num_noise, spans, bits[length - num_noise - 1 :])
    lengths = np.stack([kept, dropped], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _segments(items: int, segments: int, bits: NDArray[np.uint64]) -> Ints:
    """Cut `items` into non-empty segments, each way equally likely: choose segments - 1 of the items - 1 borders."""
    borders = np.sort(_smallest(bits, segments - 1)) + 1
    return np.diff(np.concatenate([[0], borders, [items]]))


def _smallest(bits: NDArray[np.uint64], count: int) -> Ints:
    """Return the places of the `count` smallest numbers, smallest first: a random choice in a random order."""
    if count == 0:
        return np.zeros(0, np.int64)
    chosen = np.argpartition(bits, count - 1)[:count] if count < len(bits) else np.arange(len(bits))
    return chosen[np.argsort(bits[chosen])]


@lru_cache(maxsize=64)
def _poisson_table(rate: float) -> NDArray[np.float64]:
    """Return P(length <= k) for k = 1, 2 ... of a Poisson distribution without 0, until it is 1 in float64."""
    terms = [rate]
    while len(terms) < rate or terms[-1] > 1e-18 * sum(terms):
        terms.append(terms[-1] * rate / (len(terms) + 1))
    table = np.cumsum(terms) / math.fsum(terms)
    table[-1] = 1.0
    return table


def poisson_lengths(total: int, *, rate: float, bits: NDArray[np.uint64]) -> Ints:
    """Draw lengths from a Poisson distribution without 0 until they are `total` together; the last one is cut to that.

    BART's lengths of 0 put a mask where nothing is dropped; without masks such a span is nothing and is drawn again.

    Args:    bits: at least `total` numbers.
    """
    lengths = np.searchsorted(_poisson_table(rate), uniforms(bits[:total]), side="right") + 1
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, total))
    lengths = lengths[: last + 1].astype(np.int64)
    lengths[last] -= ends[last] - total
    return lengths


def poisson_spans(length: int, *, density: float, rate: float, key: int) -> NDArray[np.bool_]:
    """Draw a noise mask of Poisson spans, bool [length]; between two spans is at least one token that is kept.

    Args:    length: at least 2. key: of `counter_random`.
    Source:  "drop 15 % of tokens in spans of lengths from a Poisson distribution with lambda = 3", Soltan et al. 2022,
             section 2; where spans may lie is not told there, and here each arrangement is equally likely.
    """
    num_noise = int(noise_tokens(np.array([length], np.int64), density=density)[0])
    bits = random_bits(key, length + 1)
    lengths = poisson_lengths(num_noise, rate=rate, bits=bits[:num_noise])
    # A span lies before, between or after the kept tokens, two never at one place. The places come in a random order,
    # so the span that was cut is as likely at one as at another; density <= 0.5 leaves enough of them.
    places = _smallest(bits[num_noise:], len(lengths))
    order = np.argsort(places)
    mask = np.zeros(length, np.bool_)
    # Before place p are p kept tokens and the spans of smaller places.
    starts = places[order] + np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    mask[np.repeat(starts, lengths[order]) + _counting(lengths[order])] = True
    return mask


def _counting(lengths: Ints) -> Ints:
    """Count from 0 within each span: 2 3 -> 0 1 0 1 2."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
