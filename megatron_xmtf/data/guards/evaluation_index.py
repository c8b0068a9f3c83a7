"""Evaluation texts as sorted hashes, in which the examples of a chunk are looked up.

    inputs  "Question: Janet's ducks lay 16 eggs a day ... How much does she make? Answer:"     one of 250 of its task
    exact   hash of the inputs, and of inputs + targets
    content "janet s ducks lay 16 eggs ... she make"      without the template's wording, which the task's texts share
    n-grams of the content (13 words, 30 kana or 20 ideographs), of inputs and of targets
    whole   inputs' content of 8 to 12 words (18 to 29 kana): looked for as one stretch

Where the template leaves no content of 8 words in one piece, the inputs are looked for whole, template included; inputs
shorter than that are found by an exact match only, and counted as `untestable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.fingerprints import text_hashes
from megatron_xmtf.data.guards.settings import GuardSettings
from megatron_xmtf.data.guards.shingles import PADDING, Stretches, hash_stretches, is_in, shingles
from megatron_xmtf.data.guards.template_wording import frequent_shingles
from megatron_xmtf.data.guards.text_units import Units, mix, range_hashes, split_units

__all__ = ["EvaluationIndex", "EvaluationText", "Table", "Whole", "build_evaluation_index"]

LARGE_GROUP = 50
"""Texts of a task, language and template from which their wording is judged by them alone; in a smaller group, which
may be questions on one passage, only what is a training template's wording too is taken for a template's."""
FEWEST_TEXTS = 3
"""Texts of a group that must share a template's wording."""


@dataclass(frozen=True)
class EvaluationText:
    """One question of an evaluation task, as the model is asked it."""

    task: str
    language: str
    inputs: str
    targets: str
    """The right answer."""
    template: str = ""
    """Name of its template: what the texts of one task, language and template share is template wording."""


class Table:
    """Hashes, each with some numbers: which texts, or which entries.

    hashes 7 7 9, numbers 0 4 1  ->  keys 7 9, offsets 0 2 3, numbers 0 4 1
    """

    def __init__(self, hashes: NDArray[np.uint64], numbers: NDArray[np.int64]) -> None:
        order = np.lexsort((numbers, hashes))
        hashes, numbers = hashes[order], numbers[order]
        fresh = np.ones(len(hashes), np.bool_)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (numbers[1:] != numbers[:-1])
        hashes, self.numbers = hashes[fresh], numbers[fresh]
        self.keys, starts = np.unique(hashes, return_index=True)
        self.offsets = np.append(starts, len(hashes))
        bits = max(10, (16 * len(self.keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._may_be = np.zeros(1 << bits, np.bool_)
        self._may_be[self.keys >> self._shift] = True

    def find(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (index into `hashes`, number) of every match, by ascending index."""
        at = np.flatnonzero(self._may_be[hashes >> self._shift])
        at = at[is_in(hashes[at], self.keys)]
        rows = np.searchsorted(self.keys, hashes[at])
        counts = self.offsets[rows + 1] - self.offsets[rows]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(at, counts), self.numbers[np.repeat(self.offsets[rows], counts) + within]


@dataclass(frozen=True)
class Whole:
    """Stretches that are looked for whole, each by an anchor: one short n-gram inside it."""

    anchors: Table
    """Hash of the anchor -> number of the stretch."""
    anchor_offsets: NDArray[np.int64]
    """[stretches], units before the anchor."""
    lengths: NDArray[np.int64]
    """[stretches], units in all."""
    hashes: NDArray[np.uint64]
    """[stretches], of all units."""
    texts: NDArray[np.int64]
    """[stretches], the evaluation text that each belongs to."""


@dataclass(frozen=True)
class EvaluationIndex:
    """All evaluation texts, ready to be looked up."""

    exact: Table
    """Hash of inputs, or of inputs and targets together -> evaluation text."""
    ngrams: Table
    """Hash of an n-gram -> evaluation texts."""
    whole: Whole
    entries: NDArray[np.int64]
    """[evaluation texts], different n-grams and whole stretches of each; 0: untestable but for an exact match."""
    wording_fraction: NDArray[np.float64]
    """[evaluation texts], share of the inputs' units that is taken for template wording."""


def build_evaluation_index(
    texts: Sequence[EvaluationText], settings: GuardSettings, *, train_wording: NDArray[np.uint64]
) -> EvaluationIndex:
    """Index evaluation texts.

    Args:    train_wording: template shingles of the training data, ascending, of all groups.
    """
    plain = [part for text in texts for part in (text.inputs, text.targets)]
    units = split_units(plain)
    hashes = text_hashes(units, plain)
    together = text_hashes(units.merged(2))
    numbers = np.arange(len(texts))
    some = np.diff(units.merged(2).offsets) > 0
    has_inputs = np.array([bool(text.inputs.strip()) for text in texts], np.bool_)
    exact = Table(
        np.concatenate([hashes[0::2][has_inputs], together[some]]), np.concatenate([numbers[has_inputs], numbers[some]])
    )
    is_wording = _template_units(texts, units, settings, train_wording)
    limits = _piece_ends(units, is_wording)
    ngrams = hash_stretches(units, settings.ngram, limits=limits)
    whole = _whole_stretches(units, settings, limits, ngrams, len(texts))
    table = Table(ngrams.hashes, ngrams.texts // 2)
    entries = np.bincount(np.concatenate([table.numbers, whole.texts]), minlength=len(texts))
    words = np.diff(np.concatenate([[0], np.cumsum(is_wording)])[units.offsets])[0::2]
    return EvaluationIndex(exact, table, whole, entries, words / np.maximum(np.diff(units.offsets)[0::2], 1))


def _template_units(
    texts: Sequence[EvaluationText], units: Units, settings: GuardSettings, train_wording: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Tell which units are template wording, bool [units]: covered by a shingle that their group shares."""
    found = shingles(units)
    code_of: dict[tuple[str, str, str], int] = {}
    groups = np.array(
        [code_of.setdefault((text.task, text.language, text.template), len(code_of)) for text in texts], np.int64
    )
    # Inputs and targets of a group are two groups: each has its own wording.
    groups = (2 * groups[:, None] + np.arange(2)).ravel()
    of_shingle = groups[found.texts]
    covered = np.zeros(len(units.hashes) + 1, np.int64)
    order = np.argsort(of_shingle, kind="stable")
    bounds = np.searchsorted(of_shingle[order], np.arange(2 * len(code_of) + 1))
    sizes = np.bincount(groups, minlength=2 * len(code_of))
    for group, size in enumerate(sizes.tolist()):
        at = order[bounds[group] : bounds[group + 1]]
        wording = frequent_shingles(
            found.hashes[at], found.texts[at], count=size, share=settings.boilerplate, fewest=FEWEST_TEXTS
        )
        if size < LARGE_GROUP:
            wording = wording[is_in(wording, train_wording)]
        at = at[is_in(found.hashes[at], wording)]
        shift = PADDING * (2 * found.texts[at] + 1)
        low, high = units.offsets[found.texts[at]], units.offsets[found.texts[at] + 1]
        np.add.at(covered, np.clip(found.starts[at] - shift, low, high), 1)
        np.add.at(covered, np.clip(found.ends[at] - shift, low, high), -1)
    return np.cumsum(covered[:-1]) > 0


def _piece_ends(units: Units, is_wording: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each unit where its piece of content ends, [units]; 0 for template wording."""
    count = len(units.hashes)
    stops = np.unique(np.concatenate([np.flatnonzero(is_wording), units.offsets]))
    ends = stops[np.searchsorted(stops, np.arange(count), side="right")] if count else stops[:0]
    return np.where(is_wording, 0, ends)


def _whole_stretches(
    units: Units, settings: GuardSettings, limits: NDArray[np.int64], ngrams: Stretches, count: int
) -> Whole:
    """Collect what is looked for whole: short pieces of content, and inputs that have nothing else."""
    short = hash_stretches(units, settings.short_ngram, limits=limits)
    begins = np.ones(len(units.hashes), np.bool_)
    begins[1:] = limits[1:] != limits[:-1]
    is_short = begins[short.starts] & (short.texts % 2 == 0) & ~np.isin(short.starts, ngrams.starts)
    starts, stops = short.starts[is_short], limits[short.starts[is_short]]
    anchors, texts = short.hashes[is_short], short.texts[is_short] // 2
    offsets = np.zeros(len(starts), np.int64)
    # Inputs without any entry: as they stand, template included, by their rarest short n-gram.
    known = np.zeros(count, np.bool_)
    known[ngrams.texts // 2] = known[texts] = True
    every = hash_stretches(units, settings.short_ngram)
    every = _only(every, (every.texts % 2 == 0) & ~known[every.texts // 2])
    _, inverse, times = np.unique(every.hashes, return_inverse=True, return_counts=True)
    order = np.lexsort((every.starts, times[inverse], every.texts))
    rarest = order[np.flatnonzero(np.diff(every.texts[order], prepend=-1))]
    begin = units.offsets[every.texts[rarest]]
    starts = np.concatenate([starts, begin])
    stops = np.concatenate([stops, units.offsets[every.texts[rarest] + 1]])
    offsets = np.concatenate([offsets, every.starts[rarest] - begin])
    anchors = np.concatenate([anchors, every.hashes[rarest]])
    texts = np.concatenate([texts, every.texts[rarest] // 2])
    return Whole(
        anchors=Table(anchors, np.arange(len(anchors))),
        anchor_offsets=offsets,
        lengths=stops - starts,
        hashes=mix(range_hashes(units.hashes, starts, stops)),
        texts=texts,
    )


def _only(stretches: Stretches, kept: NDArray[np.bool_]) -> Stretches:
    return Stretches(stretches.hashes[kept], stretches.starts[kept], stretches.ends[kept], stretches.texts[kept])
