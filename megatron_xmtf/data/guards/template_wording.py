"""Tell the wording of templates from the content that is filled in, by how many texts of a group share it.

    Premise: The cat sat.   Is it true that dogs bark? yes or no?      shared by many: "is it true that", "yes or no",
    Premise: It rained.     Is it true that the sun set? yes or no?    the first "premise" - the rest is content

Every other guard would find nothing but templates in prompted data, where thousands of rows stand in one wording. A
shingle (3 words, 6 letters of a script without spaces, 4 ideographs; the ends of a text count as words) in at least
the share `boilerplate` of a group's texts is its template's. The groups of training data are the examples of one
dataset and template, seen through a sample of at most 256. The cost: what a fifth of a group has in common is never
found, such as near duplicates that make up a fifth of their template's examples.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.examples import Chunk, chunk_texts, open_tokenizer
from megatron_xmtf.data.guards.shingles import shingles
from megatron_xmtf.data.guards.text_units import mix, split_units

__all__ = ["SAMPLE", "frequent_shingles", "salted", "sample_wording"]

SAMPLE = 256
"""Examples of a group that are looked at."""
SMALLEST_GROUP, FEWEST = 20, 5
"""A smaller group of training examples does not show for certain what is its template's; and texts that must share
wording at least, however small the group."""
SMALLEST_HINT, FEWEST_HINT = 5, 3
"""The same for a hint: enough to let examples alone that may be rows of a template, not to call content wording. In a
template's group smaller than that near duplicates are not looked for."""


def frequent_shingles(
    hashes: NDArray[np.uint64], texts: NDArray[np.int64], *, count: int, share: float, fewest: int
) -> NDArray[np.uint64]:
    """Return the shingles that are in at least `share` of `count` texts and in `fewest`; ascending.

    Args:    hashes, texts: [shingles], each with its text; a text may have one several times.
    """
    order = np.lexsort((texts, hashes))
    hashes, texts = hashes[order], texts[order]
    fresh = np.ones(len(hashes), np.bool_)
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (texts[1:] != texts[:-1])
    different, counts = np.unique(hashes[fresh], return_counts=True)
    return different[counts >= max(fewest, math.ceil(share * count))]


def salted(hashes: NDArray[np.uint64], groups: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Tie shingles to their group, so that one sorted array holds the wording of all groups."""
    return mix(hashes ^ mix(groups.astype(np.uint64) + np.uint64(1)))


def sample_wording(state: tuple[Path, float], chunk: Chunk) -> tuple[int, bool, NDArray[np.uint64]]:
    """Return (group, for certain?, template shingles of its inputs) of a chunk that is the sample of one group.

    Args:    state: (directory of the tokenizer, `GuardSettings.boilerplate`).
    """
    directory, share = state
    count, group = len(chunk.ids), int(chunk.groups[0])
    is_certain = count >= SMALLEST_GROUP
    if count < SMALLEST_HINT:
        return group, is_certain, np.empty(0, np.uint64)
    found = shingles(split_units(chunk_texts(chunk, open_tokenizer(directory))[0::2]))
    fewest = FEWEST if is_certain else FEWEST_HINT
    return group, is_certain, frequent_shingles(found.hashes, found.texts, count=count, share=share, fewest=fewest)
