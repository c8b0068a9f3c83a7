"""Examples of indexed datasets as texts, chunk by chunk, in any process.

The texts are decoded from the token ids, so that published data are guarded like one's own:

    inputs 5 6 7    targets 8 9 EOS    ->   "Is it raining?"   "yes"         kind "pairs"
                       text 5 6 7 EOS  ->   "It is raining."   ""            kind "text": all of it is inputs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.tokenizer import Tokenizer

__all__ = ["Chunk", "Corpus", "Part", "chunk_texts", "open_dataset", "open_tokenizer"]

CHUNK_TOKENS = 40_000
"""Tokens of a chunk, about: a few MB of text, and enough of it that numpy's calls cost nothing."""
CHUNK_EXAMPLES = 4096


@dataclass(frozen=True)
class Chunk:
    """Some examples of one dataset."""

    dataset: int
    """Number of the dataset."""
    prefix: Path
    first: int
    """Position of the first one in the corpus; the others follow."""
    ids: NDArray[np.int64]
    """[examples], ascending, numbers in the dataset."""
    groups: NDArray[np.int32]
    """[examples], number of the group, over all datasets."""


@dataclass(frozen=True)
class Part:
    """One dataset of the corpus."""

    dataset: ExampleDataset
    ids: NDArray[np.int64]
    """[positions], the examples that are scanned, ascending."""
    groups: NDArray[np.int32]
    """[positions], the group of each: examples of one template and dataset."""


class Corpus:
    """The examples that are scanned, of all datasets in order; a position counts them through.

    Examples with the same names in the columns `dataset` and `template` of one indexed dataset are a group; without
    columns all of it is one.

    Args:    selected: for each dataset the examples that are scanned, bool [examples]; None: all.
    """

    def __init__(self, datasets: Sequence[ExampleDataset], *, selected: Sequence[NDArray[np.bool_] | None]) -> None:
        self.parts: list[Part] = []
        self.num_groups = 0
        for dataset, chosen in zip(datasets, selected, strict=True):
            ids = np.arange(len(dataset)) if chosen is None else np.flatnonzero(chosen)
            groups, count = _groups(dataset)
            self.parts.append(Part(dataset, ids, (groups[ids] + self.num_groups).astype(np.int32)))
            self.num_groups += count
        self.bases = np.concatenate([[0], np.cumsum([len(part.ids) for part in self.parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.bases[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """Return (number of the dataset, example of that dataset) of a position."""
        number = int(np.searchsorted(self.bases, position, side="right")) - 1
        return number, int(self.parts[number].ids[position - self.bases[number]])

    def in_small_groups(self, size: int) -> NDArray[np.bool_]:
        """Tell which positions are in a template's group of fewer than `size` examples; none where none are known."""
        small = [np.empty(0, np.bool_)]
        for part in self.parts:
            sizes = np.bincount(part.groups, minlength=self.num_groups)
            small.append((sizes[part.groups] < size) & ("template" in part.dataset.column_names))
        return np.concatenate(small)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all positions in order, in chunks of about `CHUNK_TOKENS`."""
        for number, part in enumerate(self.parts):
            for first in range(0, len(part.ids), CHUNK_EXAMPLES):
                ids = part.ids[first : first + CHUNK_EXAMPLES]
                sizes = part.dataset.input_lengths[ids].astype(np.int64) + part.dataset.target_lengths[ids]
                numbers = np.cumsum(sizes) // CHUNK_TOKENS
                cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(ids)]
                for start, stop in pairwise(cuts):
                    yield self._chunk(number, first + start, first + stop)

    def _chunk(self, number: int, start: int, stop: int) -> Chunk:
        part = self.parts[number]
        first = int(self.bases[number]) + start
        return Chunk(number, part.dataset.prefix, first, part.ids[start:stop], part.groups[start:stop])

    def samples(self, size: int) -> Iterator[Chunk]:
        """Yield for each group up to `size` of its examples, evenly spaced."""
        for number, part in enumerate(self.parts):
            order = np.argsort(part.groups, kind="stable")
            starts = np.flatnonzero(np.diff(part.groups[order], prepend=-1))
            for start, stop in pairwise([*starts.tolist(), len(order)]):
                places = order[start + np.unique(np.linspace(0, stop - start - 1, min(size, stop - start)).astype(int))]
                yield Chunk(number, part.dataset.prefix, -1, part.ids[places], part.groups[places])

    def pick(self, positions: NDArray[np.int64]) -> list[Chunk]:
        """Return chunks with these positions (ascending), one for each dataset that has some."""
        chunks = []
        for number, part in enumerate(self.parts):
            low, high = np.searchsorted(positions, self.bases[number : number + 2])
            places = positions[low:high] - self.bases[number]
            if len(places):
                chunks.append(Chunk(number, part.dataset.prefix, -1, part.ids[places], part.groups[places]))
        return chunks


def _groups(dataset: ExampleDataset) -> tuple[NDArray[np.int64], int]:
    """Number the groups of a dataset. Returns: group of each example, [examples]; number of groups."""
    codes = np.zeros(len(dataset), np.int64)
    for name in ("dataset", "template"):
        column = dataset.column(name)
        if column is not None:
            codes = codes * len(dataset.names(name)) + column
    names, groups = np.unique(codes, return_inverse=True)
    return groups, len(names)


@lru_cache(maxsize=64)
def open_dataset(prefix: Path) -> ExampleDataset:
    """Open a dataset once in this process."""
    return ExampleDataset.open(prefix)


@lru_cache(maxsize=1)
def open_tokenizer(directory: Path) -> Tokenizer:
    """Load a tokenizer once in this process."""
    return Tokenizer.load(directory)


def chunk_texts(chunk: Chunk, tokenizer: Tokenizer) -> list[str]:
    """Decode a chunk: inputs and targets in turn, [2 * examples]; EOS and special tokens are left out."""
    dataset = open_dataset(chunk.prefix)
    halves = [_tokens(dataset, half, chunk.ids) for half in dataset.halves]
    for tokens in halves[-1]:
        if tokens and tokens[-1] == tokenizer.eos_id:
            tokens.pop()
    if dataset.kind == "text":
        halves.append([[] for _ in chunk.ids])
    pairs = list(chain.from_iterable(zip(*halves, strict=True)))
    return tokenizer.backend.decode_batch(pairs, skip_special_tokens=True)


def _tokens(dataset: ExampleDataset, half: str, ids: NDArray[np.int64]) -> list[list[int]]:
    """Return the token ids of some examples of one half."""
    file = dataset.halves[half]
    if not len(ids) or ids[-1] - ids[0] + 1 != len(ids):
        return [file[int(number)].tolist() for number in ids]
    start, stop = file.token_range(int(ids[0]), int(ids[-1]) + 1)
    tokens = file.tokens[start:stop].tolist()
    ends = np.cumsum(file.lengths[ids[0] : ids[-1] + 1], dtype=np.int64).tolist()
    return [tokens[begin:end] for begin, end in pairwise([0, *ends])]
