"""Find examples that are nearly an earlier one: candidates by MinHash bands, each verified exactly.

An example is a near duplicate of an earlier one of its group if
    1. the Jaccard similarity of their inputs' shingles, template wording left out, is at least `jaccard`,
    2. that of their targets' shingles is too, and
    3. no changed stretch is longer than 5 words (or 10 letters): a longer one is another field, not a retouch.

    He paid 30 dollars to the man | yes      He paid 30 euros to the man | yes       a retouch: one word
    <200 words> Who won the match? | Ali     <200 words> Who lost the match? | Bo    2. fails: other targets
    <200 words> Is the museum open on Mondays? | yes   <200 words> Did he ever see his son again? | yes    3. fails

The first of a chain of near duplicates is always kept, and what is flagged has a verified earlier partner: there are
no false positives. Missed are those that share no band (`fingerprints`), those behind the limit of comparisons, which
are counted, and those of a template with fewer than 5 examples, where what is the template's cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.examples import Chunk, chunk_texts, open_tokenizer
from megatron_xmtf.data.guards.fingerprints import band_keys
from megatron_xmtf.data.guards.shingles import PADDING, Size, Stretches, is_in, shingles
from megatron_xmtf.data.guards.template_wording import salted
from megatron_xmtf.data.guards.text_units import Units, mix, split_units

__all__ = ["NearPair", "VerifyState", "find_near_duplicates", "near_duplicate_bands", "similarity", "verify_pairs"]

LONGEST_CHANGE = Size(words=5, characters=10)
"""A changed stretch that weighs more makes two examples different ones."""
MOST_COMPARISONS = 32
"""Earlier members of a bucket that an example is compared with."""
PAIRS_PER_TASK = 256
TARGET_TAG = np.uint64(0xD6E8FEB86659FD93)


def content_shingles(units: Units, groups: NDArray[np.int32], wording: NDArray[np.uint64]) -> Stretches:
    """Return the shingles that tell examples apart: of inputs without template wording, and of targets, marked.

    Args:    units: of inputs and targets in turn. groups: [examples]. wording: `salted` shingles, ascending.
    Returns: stretches whose `texts` are the texts of `units` (2 * example, 2 * example + 1).
    """
    found = shingles(units)
    is_target = found.texts % 2 == 1
    kept = is_target | ~is_in(salted(found.hashes, groups[found.texts // 2]), wording)
    hashes = np.where(is_target, mix(found.hashes ^ TARGET_TAG), found.hashes)
    return Stretches(hashes[kept], found.starts[kept], found.ends[kept], found.texts[kept])


def near_duplicate_bands(units: Units, groups: NDArray[np.int32], wording: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the band keys of a chunk, [BANDS, examples].

    Inputs and targets make one set: where each is similar enough, the whole is.
    """
    content = content_shingles(units, groups, wording)
    offsets = np.searchsorted(content.texts, 2 * np.arange(len(groups) + 1))
    return band_keys(content.hashes, offsets, groups.astype(np.uint64))


class NearPair(NamedTuple):
    """A near duplicate and its earlier partner, as positions in the corpus."""

    later: int
    earlier: int


@dataclass(frozen=True)
class VerifyState:
    """What a worker needs to compare two examples."""

    tokenizer: Path
    wording: NDArray[np.uint64]
    jaccard: float


class PairTask(NamedTuple):
    """Examples, in chunks, and pairs of them by their place in all chunks together."""

    chunks: list[Chunk]
    pairs: NDArray[np.int64]
    """[pairs, 2]."""


def verify_pairs(state: VerifyState, task: PairTask) -> NDArray[np.bool_]:
    """Tell which pairs are near duplicates, bool [pairs]."""
    tokenizer = open_tokenizer(state.tokenizer)
    texts = [text for chunk in task.chunks for text in chunk_texts(chunk, tokenizer)]
    groups = np.concatenate([chunk.groups for chunk in task.chunks])
    units = split_units(texts)
    everything, content = shingles(units), content_shingles(units, groups, state.wording)
    views = [_ExampleView(number, units, everything, content) for number in range(len(groups))]
    return np.array(
        [
            bool(groups[later] == groups[earlier]) and similarity(views[later], views[earlier]) >= state.jaccard
            for later, earlier in task.pairs.tolist()
        ],
        np.bool_,
    )


class _ExampleView:
    """One example of a batch: its sets of shingles, and where its shingles lie."""

    def __init__(self, number: int, units: Units, everything: Stretches, content: Stretches) -> None:
        self.halves = []
        for text in (2 * number, 2 * number + 1):
            low, high = np.searchsorted(content.texts, (text, text + 1))
            first, last = np.searchsorted(everything.texts, (text, text + 1))
            start, stop = units.offsets[text], units.offsets[text + 1]
            begin = start + 2 * PADDING * text + PADDING  # where the text's first unit lies in the padded units
            self.halves.append(
                (
                    np.unique(content.hashes[low:high]),
                    everything.hashes[first:last],
                    everything.starts[first:last] - begin,
                    everything.ends[first:last] - begin,
                    units.kinds[start:stop],
                )
            )


def similarity(one: _ExampleView, other: _ExampleView) -> float:
    """Return the smaller Jaccard similarity of inputs and of targets; 0 where a changed stretch is too long."""
    values = []
    for mine, theirs in zip(one.halves, other.halves, strict=True):
        shared = len(np.intersect1d(mine[0], theirs[0], assume_unique=True))
        union = len(mine[0]) + len(theirs[0]) - shared
        values.append(shared / union if union else 1.0)
        if _changed_too_much(mine, theirs[1]) or _changed_too_much(theirs, mine[1]):
            return 0.0
    return min(values)


def _changed_too_much(
    half: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]],
    others: NDArray[np.uint64],
) -> bool:
    """Tell whether some stretch of units that no shared shingle covers weighs more than `LONGEST_CHANGE`."""
    _, hashes, starts, ends, kinds = half
    count = len(kinds)
    shared = np.isin(hashes, others)
    change = np.zeros(count + 1, np.int64)
    np.add.at(change, np.clip(starts[shared], 0, count), 1)
    np.add.at(change, np.clip(ends[shared], 0, count), -1)
    covered = np.cumsum(change[:-1]) > 0
    reached = np.cumsum(np.where(covered, 0, LONGEST_CHANGE.weights(kinds)))
    # The weight since the last covered unit, which is the largest sum reached at a covered unit so far.
    since = reached - np.maximum.accumulate(np.where(covered, reached, 0)) if count else reached
    return bool((since > LONGEST_CHANGE.weight).any())


def find_near_duplicates(
    bands: Iterable[NDArray[np.uint32]],
    skipped: NDArray[np.bool_],
    *,
    verify: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
) -> tuple[NDArray[np.bool_], list[NearPair], int]:
    """Flag every position that has a verified earlier near duplicate among those it shares a band with.

    Args:    bands: for each band its keys, [positions]; 0: none. skipped: [positions], neither flagged nor compared
             with (exact duplicates). verify: tells which pairs [pairs, 2] of positions (later, earlier) are real.
    Returns: flags [positions]; a pair for each flag, in order; comparisons left out because of `MOST_COMPARISONS`.
    """
    flags = np.zeros(len(skipped), np.bool_)
    partners: dict[int, int] = {}
    left_out = 0
    for keys in bands:
        for pairs in _rounds(keys, skipped, flags):
            real = pairs[verify(pairs)]
            flags[real[:, 0]] = True
            partners.update(zip(real[:, 0].tolist(), real[:, 1].tolist(), strict=True))
        left_out += _left_out(keys, skipped, flags)
    return flags, [NearPair(later, partners[later]) for later in sorted(partners)], left_out


def _buckets(keys: NDArray[np.uint32], skipped: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (positions that share a key with another, bucket by bucket, ascending in each; place in its bucket)."""
    members = np.flatnonzero((keys != 0) & ~skipped)
    members = members[np.argsort(keys[members], kind="stable")]
    sorted_keys = keys[members]
    first = np.ones(len(members), np.bool_)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(members)), 0))
    return members, np.arange(len(members)) - starts


def _rounds(
    keys: NDArray[np.uint32], skipped: NDArray[np.bool_], flags: NDArray[np.bool_]
) -> Iterator[NDArray[np.int64]]:
    """Yield pairs to be verified: in round r each member not yet flagged with the r-th of its bucket."""
    members, places = _buckets(keys, skipped)
    for number in range(MOST_COMPARISONS):
        at = np.flatnonzero((places > number) & ~flags[members])
        if not len(at):
            return
        later, earlier = members[at], members[at - places[at] + number]
        order = np.argsort(later)
        yield np.stack([later[order], earlier[order]], axis=1)


def _left_out(keys: NDArray[np.uint32], skipped: NDArray[np.bool_], flags: NDArray[np.bool_]) -> int:
    members, places = _buckets(keys, skipped)
    beyond = places[(places > MOST_COMPARISONS) & ~flags[members]]
    return int((beyond - MOST_COMPARISONS).sum())
