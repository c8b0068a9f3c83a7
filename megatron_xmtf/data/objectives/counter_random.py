"""Random numbers that follow from what they are for, not from what was drawn before.

    chunk          0        1        2                 key(seed, dataset) = 0x3a..
    chunk_keys     9f..     07..     c4..              one for each chunk, the same for ever
    occurrence     17                                  the second chunk, at place 17 of the packing index
    noise key      e2..                                its own at every place
    uniforms       0.31 0.88 0.02 ...                  number i is a function of (noise key, i)

So the lengths of any chunk can be computed without the chunks before it, on any rank, and its tokens agree later.
The generator is splitmix64, written out in numpy: numpy's own generators may draw other numbers in another version.

Source:  Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (OOPSLA).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.selection import scramble

__all__ = ["chunk_key", "chunk_keys", "key_of", "occurrence_key", "occurrence_keys", "random_bits", "uniforms"]

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def key_of(*parts: int | str) -> int:
    """Return a key of 64 bits for some names and numbers; equal parts give equal keys, on any machine."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def chunk_keys(numbers: NDArray[np.uint64], *, key: int) -> NDArray[np.uint64]:
    """Return the key of each chunk, uint64 [chunks].

    Args:    numbers: uint64 [chunks], their numbers in the dataset. key: of seed and dataset.
    """
    return scramble(scramble(numbers, seed=0) ^ np.uint64(key), seed=1)


def chunk_key(number: int, *, key: int) -> int:
    """Return the key of one chunk: `chunk_keys` of it alone, without numpy's cost of a call."""
    return _scrambled(_scrambled(number, seed=0) ^ key, seed=1)


def occurrence_key(chunk_key: int, occurrence: int) -> int:
    """Return the key of one occurrence of a chunk."""
    return _scrambled(_scrambled(occurrence, seed=2) ^ chunk_key, seed=3)


def occurrence_keys(chunk_keys: NDArray[np.uint64], occurrences: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the keys of occurrences, uint64 [n], as `occurrence_key` does one by one."""
    return scramble(scramble(occurrences, seed=2) ^ chunk_keys, seed=3)


def _scrambled(value: int, *, seed: int) -> int:
    """Return `scramble` of one number; the tests hold the two together."""
    mixed = (value + GOLDEN * (seed + 1)) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def random_bits(key: int, count: int) -> NDArray[np.uint64]:
    """Return the numbers 0 to count - 1 of a key, uint64 [count]."""
    with np.errstate(over="ignore"):
        return scramble(np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key), seed=0)


def uniforms(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn bits into numbers in [0, 1), float64."""
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
