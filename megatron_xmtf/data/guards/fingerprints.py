"""Fingerprints of examples: a key that exact duplicates share, and MinHash bands that near duplicates share some of.

    inputs "Is it raining?"  targets "Yes."      units  is it raining | yes
    inputs "is it raining"   targets " yes"      units  is it raining | yes      the same key

MinHash: 14 bands of 5 minima each, a band hashed into 32 bits: 56 bytes an example. Two examples whose shingle sets
have Jaccard similarity s share at least one band with probability 1 - (1 - s**5)**14:

    s            0.3    0.5    0.7    0.8     0.85    0.9     0.95
    probability  0.03   0.36   0.92   0.996   0.9996  1.0000  1.0000

Source:  A. Broder, On the resemblance and containment of documents (1997); banding as in J. Leskovec, A. Rajaraman and
         J. Ullman, Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.text_units import Units, mix, range_hashes

__all__ = ["BANDS", "band_keys", "exact_keys", "text_hashes"]

BANDS, ROWS = 14, 5
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def text_hashes(units: Units, texts: Sequence[str] | None = None) -> NDArray[np.uint64]:
    """Return a hash of the units of each text, [texts].

    Args:    texts: as they were before they were split; a text without any unit ("?!") is then hashed as it stands,
             white space aside. None: it has the hash of an empty one.
    """
    starts, ends = units.offsets[:-1], units.offsets[1:]
    hashes = mix(range_hashes(units.hashes, starts, ends) + (ends - starts).astype(np.uint64))
    if texts is not None:
        for number in np.flatnonzero(starts == ends).tolist():
            plain = " ".join(texts[number].split())
            if plain:
                digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                hashes[number] = int.from_bytes(digest, "little")
    return hashes


def exact_keys(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a key of each example, [examples], out of the hashes of inputs and targets in turn, [2 * examples].

    64 bits: among 10 million different examples the probability that any two agree is 3e-6, among 80 million 2e-4.
    """
    return mix(hashes[0::2] ^ mix(hashes[1::2] + GOLDEN))


def band_keys(
    shingles: NDArray[np.uint64], offsets: NDArray[np.int64], salts: NDArray[np.uint64]
) -> NDArray[np.uint32]:
    """Return the band keys of sets of shingles.

    Args:    shingles: [sum of sizes], the sets one after another; repeats change nothing. offsets: [sets + 1].
             salts: [sets], mixed into the keys, so that sets of different salts share none.
    Returns: [BANDS, sets]; 0 where the set is empty, and only there.
    """
    full = np.flatnonzero(np.diff(offsets))
    keys = np.zeros((BANDS, len(offsets) - 1), np.uint32)
    if not len(full):
        return keys
    multipliers = mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)) | np.uint64(1)
    additions = mix(np.arange(1001, BANDS * ROWS + 1001, dtype=np.uint64))
    starts = offsets[:-1][full]
    for band in range(BANDS):
        key = mix(salts[full] + np.uint64(band))
        for row in range(band * ROWS, (band + 1) * ROWS):
            # Multiply-shift: the upper half of a * x + b, as good as random for x that are hashes themselves.
            values = ((shingles * multipliers[row] + additions[row]) >> np.uint64(32)).astype(np.uint32)
            key = mix(key ^ np.minimum.reduceat(values, starts))
        keys[band, full] = np.maximum((key >> np.uint64(32)).astype(np.uint32), 1)
    return keys
