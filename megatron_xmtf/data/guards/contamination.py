"""Find training examples that hold an evaluation text, exactly or by n-gram overlap.

    exact    normalised inputs (or inputs and targets together) are those of an evaluation text (or its text and answer)
    n-gram   inputs and targets, read as one text, hold an n-gram of an evaluation text's content: 13 words (GPT-3,
             AlexaTM), 30 letters of a script without spaces or 20 ideographs; or a shorter evaluation text as a whole
    overlap  share of the evaluation text's n-grams that the example holds; 1 for a text found whole

What is common to a task's texts, or to a template's, is no content (`evaluation_index`, `template_wording`): rows that
merely stand in the template of an evaluation task are clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.evaluation_index import EvaluationIndex, Whole
from megatron_xmtf.data.guards.fingerprints import text_hashes
from megatron_xmtf.data.guards.settings import GuardSettings
from megatron_xmtf.data.guards.shingles import hash_stretches
from megatron_xmtf.data.guards.text_units import Units, mix, range_hashes

__all__ = ["Finds", "find_contamination", "matched_stretches"]


@dataclass(frozen=True)
class Finds:
    """Pairs of an example and an evaluation text that it holds."""

    examples: NDArray[np.int64]
    """[pairs], ascending."""
    texts: NDArray[np.int64]
    """[pairs], number of the evaluation text."""
    overlaps: NDArray[np.float32]
    """[pairs], share of the text's n-grams; 0 for a pair that only the exact match found."""
    exact: NDArray[np.bool_]
    """[pairs], True where inputs, or inputs and targets, are equal as a whole."""


def find_contamination(units: Units, texts: list[str], index: EvaluationIndex, settings: GuardSettings) -> Finds:
    """Look the examples of a chunk up.

    Args:    units, texts: of inputs and targets in turn.
    """
    num_texts = len(index.entries)
    exact = np.unique(_exact_pairs(units, texts, index, num_texts))
    matched, _, _ = matched_stretches(units.merged(2), index, settings)
    pairs, counts = np.unique(matched, return_counts=True)
    overlaps = (counts / index.entries[pairs % num_texts]).astype(np.float32) if len(pairs) else np.empty(0, np.float32)
    enough = overlaps >= settings.minimum_overlap
    pairs, overlaps = pairs[enough], overlaps[enough]
    every = np.union1d(exact, pairs)
    share = np.zeros(len(every), np.float32)
    share[np.searchsorted(every, pairs)] = overlaps
    divisor = max(num_texts, 1)
    return Finds(every // divisor, every % divisor, share, np.isin(every, exact))


def _exact_pairs(units: Units, texts: list[str], index: EvaluationIndex, num_texts: int) -> NDArray[np.int64]:
    """Return example * num_texts + evaluation text of each exact match."""
    inputs = text_hashes(units, texts)[0::2]
    together = text_hashes(units.merged(2))
    pairs = []
    for hashes, usable in (
        (inputs, np.array([bool(text.strip()) for text in texts[0::2]], np.bool_)),
        (together, np.diff(units.merged(2).offsets) > 0),
    ):
        some = np.flatnonzero(usable)
        at, numbers = index.exact.find(hashes[some])
        pairs.append(some[at] * num_texts + numbers)
    return np.concatenate(pairs)


def matched_stretches(
    examples: Units, index: EvaluationIndex, settings: GuardSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return every n-gram and whole stretch that is both in an example and in an evaluation text.

    Args:    examples: units, a text for each example.
    Returns: [matches]: example * number of evaluation texts + evaluation text, an n-gram once for each pair; first
             unit; one beyond the last.
    """
    num_texts = len(index.entries)
    ngrams = hash_stretches(examples, settings.ngram)
    at, texts = index.ngrams.find(ngrams.hashes)
    pairs = ngrams.texts[at] * num_texts + texts
    # The same n-gram several times in one example counts once.
    order = np.lexsort((ngrams.starts[at], ngrams.hashes[at], pairs))
    at, pairs = at[order], pairs[order]
    fresh = np.ones(len(at), np.bool_)
    fresh[1:] = (pairs[1:] != pairs[:-1]) | (ngrams.hashes[at][1:] != ngrams.hashes[at][:-1])
    at, pairs = at[fresh], pairs[fresh]
    owners, begins, ends, numbers = _whole_matches(examples, index.whole, settings)
    return (
        np.concatenate([pairs, owners * num_texts + index.whole.texts[numbers]]),
        np.concatenate([ngrams.starts[at], begins]),
        np.concatenate([ngrams.ends[at], ends]),
    )


def _whole_matches(
    examples: Units, whole: Whole, settings: GuardSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (example, first unit, one beyond the last, stretch) of each stretch found whole, once an example."""
    short = hash_stretches(examples, settings.short_ngram)
    at, numbers = whole.anchors.find(short.hashes)
    owners = short.texts[at]
    begins = short.starts[at] - whole.anchor_offsets[numbers]
    ends = begins + whole.lengths[numbers]
    inside = np.flatnonzero((begins >= examples.offsets[owners]) & (ends <= examples.offsets[owners + 1]))
    owners, begins, ends, numbers = owners[inside], begins[inside], ends[inside], numbers[inside]
    equal = np.flatnonzero(mix(range_hashes(examples.hashes, begins, ends)) == whole.hashes[numbers])
    _, first = np.unique(owners[equal] * len(whole.lengths) + numbers[equal], return_index=True)
    chosen = equal[first]
    return owners[chosen], begins[chosen], ends[chosen], numbers[chosen]
