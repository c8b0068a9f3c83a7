"""Count what the guards found, by dataset, language and task, and show enough of it for a person to judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards.contamination import Finds, matched_stretches
from megatron_xmtf.data.guards.evaluation_index import EvaluationIndex, EvaluationText
from megatron_xmtf.data.guards.examples import Corpus, chunk_texts
from megatron_xmtf.data.guards.settings import BITS, CONTAMINATED_EXACT, CONTAMINATED_NGRAM, GuardSettings
from megatron_xmtf.data.guards.text_units import split_units
from megatron_xmtf.data.tokenizer import Tokenizer

__all__ = ["ContaminationTally", "build_report", "language_codes"]

SHOWN_PER_TASK = 3
"""Worst matches kept for each dataset, task and task language."""
MOST_SHOWN = 30
SHOWN_PAIRS = 10
SHOWN_CHARACTERS = 400
COUNTED_BITS = {
    **BITS,
    "contaminated_exact": CONTAMINATED_EXACT,
    "contaminated_ngram": CONTAMINATED_NGRAM,
}


def language_codes(dataset: ExampleDataset) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of a dataset's languages and the index of each example's, [examples]; "" where none is known."""
    column = dataset.column("language")
    if column is None:
        return [""], np.zeros(len(dataset), np.int64)
    return dataset.names("language"), column.astype(np.int64)


class ContaminationTally:
    """Sums up finds chunk by chunk; its memory depends on the number of tasks and languages, not of examples.

    Args:    texts: the evaluation texts. datasets: the training datasets.
    """

    def __init__(self, texts: Sequence[EvaluationText], datasets: Sequence[ExampleDataset]) -> None:
        code_of: dict[tuple[str, str], int] = {}
        self.task_of = np.array(
            [code_of.setdefault((text.task, text.language), len(code_of)) for text in texts], np.int64
        )
        self.tasks = list(code_of)
        self._languages = [language_codes(dataset) for dataset in datasets]
        self._counts: Counter[tuple[int, str, int, str]] = Counter()
        self._found: dict[tuple[int, str], NDArray[np.bool_]] = {}
        self.worst: dict[tuple[int, int], list[tuple[float, int, int, int, bool]]] = {}

    def add(self, dataset: int, first: int, ids: NDArray[np.int64], finds: Finds) -> None:
        """Take over the finds of a chunk: `ids` are its examples, `first` the position of the first of them."""
        if not len(finds.examples):
            return
        names, codes = self._languages[dataset]
        languages, tasks = codes[ids[finds.examples]], self.task_of[finds.texts]
        ngram = finds.overlaps > 0
        for language in np.unique(languages).tolist():
            of_language = languages == language
            found = self._found.setdefault((dataset, names[language]), np.zeros(len(self.task_of), np.bool_))
            found[finds.texts[of_language]] = True
            for task in np.unique(tasks[of_language]).tolist():
                chosen = of_language & (tasks == task)
                for kind, which in (("examples", chosen), ("exact", chosen & finds.exact), ("ngram", chosen & ngram)):
                    count = len(np.unique(finds.examples[which]))
                    self._counts[dataset, names[language], task, kind] += count
        order = np.lexsort((finds.texts, finds.examples, ~finds.exact, -finds.overlaps))
        for task in np.unique(tasks).tolist():
            worst = self.worst.setdefault((dataset, task), [])
            ranked = order[tasks[order] == task]
            _, once = np.unique(finds.examples[ranked], return_index=True)  # an example once, with its worst text
            for at in ranked[np.sort(once)[:SHOWN_PER_TASK]].tolist():
                share, text, exact = float(finds.overlaps[at]), int(finds.texts[at]), bool(finds.exact[at])
                example = int(finds.examples[at])
                worst.append((-max(share, float(exact)), first + example, int(ids[example]), text, exact))
            worst.sort()
            del worst[SHOWN_PER_TASK:]

    def rows(self, datasets: Sequence[ExampleDataset]) -> list[dict[str, Any]]:
        """Return a row for each training dataset, its language, task and the task's language that have finds."""
        rows = []
        for (dataset, language), found in sorted(self._found.items()):
            for task, (name, task_language) in enumerate(self.tasks):
                examples, exact, ngram = (
                    self._counts[dataset, language, task, kind] for kind in ("examples", "exact", "ngram")
                )
                if examples:
                    of_task = self.task_of == task
                    rows.append(
                        {
                            "dataset": datasets[dataset].name,
                            "language": language,
                            "task": name,
                            "evaluation_language": task_language,
                            "examples": examples,
                            "exact": exact,
                            "ngram": ngram,
                            "evaluation_texts": int(of_task.sum()),
                            "found": int((found & of_task).sum()),
                        }
                    )
        return rows

    def task_rows(self, index: EvaluationIndex) -> list[dict[str, Any]]:
        """Return a row for each task and language: how many of its texts were found anywhere."""
        found = np.zeros(len(self.task_of), np.bool_)
        for some in self._found.values():
            found |= some
        rows = []
        for task, (name, language) in enumerate(self.tasks):
            of_task = self.task_of == task
            rows.append(
                {
                    "task": name,
                    "language": language,
                    "evaluation_texts": int(of_task.sum()),
                    "found": int((found & of_task).sum()),
                    "untestable": int((of_task & (index.entries == 0)).sum()),
                    "template_wording_fraction": round(float(index.wording_fraction[of_task].mean()), 4),
                }
            )
        return rows


def build_report(
    corpus: Corpus,
    flags: Sequence[NDArray[np.uint8]],
    *,
    tokenizer: Tokenizer,
    settings: GuardSettings,
    evaluation_texts: Sequence[EvaluationText],
    index: EvaluationIndex,
    tally: ContaminationTally,
    duplicate_pairs: Sequence[tuple[int, int]],
    near_duplicate_pairs: Sequence[tuple[int, int]],
    comparisons_left_out: int,
) -> dict[str, Any]:
    """Return the report, as JSON holds it.

    Args:    duplicate_pairs, near_duplicate_pairs: (later, earlier) positions in the corpus; the first are shown.
    """
    datasets = [part.dataset for part in corpus.parts]
    reader = _Reader(corpus, tokenizer)
    return {
        "datasets": [_dataset_row(corpus, number, flags[number]) for number in range(len(datasets))],
        "contamination": tally.rows(datasets),
        "tasks": tally.task_rows(index),
        "matches": _matches(reader, settings, evaluation_texts, index, tally),
        "duplicate_pairs": [reader.pair(later, earlier) for later, earlier in duplicate_pairs[:SHOWN_PAIRS]],
        "near_duplicate_pairs": [reader.pair(later, earlier) for later, earlier in near_duplicate_pairs[:SHOWN_PAIRS]],
        "near_duplicate_comparisons_left_out": comparisons_left_out,
    }


def _dataset_row(corpus: Corpus, number: int, flags: NDArray[np.uint8]) -> dict[str, Any]:
    part = corpus.parts[number]
    names, codes = language_codes(part.dataset)
    codes, scanned = codes[part.ids], flags[part.ids]

    def counts(which: NDArray[np.uint8]) -> dict[str, int]:
        found = {name: int(np.count_nonzero(which & np.uint8(bit))) for name, bit in COUNTED_BITS.items()}
        return {"examples": len(which), **found}

    by_language = {names[code]: counts(scanned[codes == code]) for code in np.unique(codes).tolist()}
    return {"name": part.dataset.name, **counts(scanned), "languages": dict(sorted(by_language.items()))}


class _Reader:
    """Decodes single examples to be shown."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self._corpus, self._tokenizer = corpus, tokenizer

    def texts(self, position: int) -> list[str]:
        """Return inputs and targets of the example at a position."""
        (chunk,) = self._corpus.pick(np.array([position]))
        return chunk_texts(chunk, self._tokenizer)

    def place(self, position: int) -> tuple[str, int]:
        """Return the name of the dataset and the number of the example."""
        number, example = self._corpus.locate(position)
        return self._corpus.parts[number].dataset.name, example

    def pair(self, later: int, earlier: int) -> dict[str, Any]:
        """Show an example beside the earlier one that it repeats."""
        (dataset, example), (first_dataset, first_example) = self.place(later), self.place(earlier)
        return {
            "dataset": dataset,
            "example": example,
            "first_dataset": first_dataset,
            "first_example": first_example,
            "text": _shown(self.texts(later)),
            "first_text": _shown(self.texts(earlier)),
        }


def _matches(
    reader: _Reader,
    settings: GuardSettings,
    evaluation_texts: Sequence[EvaluationText],
    index: EvaluationIndex,
    tally: ContaminationTally,
) -> list[dict[str, Any]]:
    """Show the worst matches: first the worst of each dataset and task, then the second ones ..."""
    ranked = sorted(
        (rank, share, position, text, exact)
        for worst in tally.worst.values()
        for rank, (share, position, _, text, exact) in enumerate(worst)
    )
    shown = []
    for _, share, position, number, exact in ranked[:MOST_SHOWN]:
        text, (dataset, example) = evaluation_texts[number], reader.place(position)
        parts = reader.texts(position)
        shown.append(
            {
                "dataset": dataset,
                "example": example,
                "kind": "exact" if exact else "ngram",
                "task": text.task,
                "evaluation_language": text.language,
                "overlap_fraction": round(-share, 4),
                "ngram": _matched_wording(parts, number, index, settings),
                "train_text": _shown(parts),
                "evaluation_text": _shown([text.inputs, text.targets]),
            }
        )
    return shown


def _matched_wording(parts: list[str], number: int, index: EvaluationIndex, settings: GuardSettings) -> str:
    """Return the longest stretch of an example that n-grams of one evaluation text cover; "" where none does."""
    units = split_units(parts).merged(2)
    pairs, starts, ends = matched_stretches(units, index, settings)
    chosen = pairs == number
    covered = np.zeros(len(units.hashes) + 1, np.int64)
    np.add.at(covered, starts[chosen], 1)
    np.add.at(covered, ends[chosen], -1)
    inside = np.concatenate([[False], np.cumsum(covered)[:-1] > 0, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)
    if not len(edges):
        return ""
    start, stop = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
    return _cut(units.wording(start, stop))


def _shown(parts: Sequence[str]) -> str:
    return _cut(" -> ".join(part.strip() for part in parts if part.strip()))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 4] + " ..."
