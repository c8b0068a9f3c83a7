"""Chunks: documents cut into parts as long as a row allows, the rest last; no part is a single token.

    documents (without EOS)   5  13     0  10        at most 6 tokens a chunk
    chunks                    5  6 5 2  0  6 4       the rest of 13 would be 1: the chunk before gives it one
    document of each          0  1 1 1  2  3 3
    first token of each       0  0 6 11 0  0 6
    is_end                    *      *  *    *       the document ends with the chunk

Full chunks and rests fill rows: 99.97 % where even parts, many of them longer than half a row, fill 86 % (lognormal
lengths, `benchmarks/objectives.py`). Invariant: the chunks of a document, side by side, are the document.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chunks"]


class Chunks:
    """Chunks of documents.

    Args:    lengths: [documents], tokens without EOS. chunk_length: tokens of a chunk at most; at least 3, so that no
             part of a longer document is a single token.
    """

    def __init__(self, lengths: NDArray[np.integer], *, chunk_length: int) -> None:
        self.document_lengths, self.chunk_length = lengths, chunk_length
        longest = int(lengths.max()) if len(lengths) else 0
        self._first: NDArray[np.int64] | None = None
        """[documents + 1], number of each document's first chunk; None: every document is one chunk."""
        if longest > chunk_length:
            self._first = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(np.maximum(-(-lengths.astype(np.int64) // chunk_length), 1), out=self._first[1:])

    def __len__(self) -> int:
        return len(self.document_lengths) if self._first is None else int(self._first[-1])

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """Document of each chunk, [chunks]."""
        if self._first is None:
            return np.arange(len(self))
        return np.repeat(np.arange(len(self.document_lengths)), np.diff(self._first))

    def lengths(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return (tokens, is_end) of the chunks begin..end-1."""
        return self.lengths_of(np.arange(begin, end))

    def lengths_of(self, chunks: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return (tokens, is_end) of some chunks."""
        if self._first is None:
            lengths = self.document_lengths[chunks].astype(np.int64)
            return lengths, np.ones(len(lengths), np.bool_)
        documents = self.documents[chunks]
        parts = self._first[documents + 1] - self._first[documents]
        number = chunks - self._first[documents]
        rest = self.document_lengths[documents] - (parts - 1) * self.chunk_length
        gives_one = (rest == 1) & (parts > 1)
        is_end = number == parts - 1
        full = self.chunk_length - (gives_one & (number == parts - 2))
        return np.where(is_end, rest + gives_one, full), is_end

    def locate(self, chunk: int) -> tuple[int, int, int, bool]:
        """Return (document, first token, tokens, is_end) of one chunk."""
        if self._first is None:
            return chunk, 0, int(self.document_lengths[chunk]), True
        document = int(np.searchsorted(self._first, chunk, side="right")) - 1
        first, parts = int(self._first[document]), int(self._first[document + 1] - self._first[document])
        number, whole = chunk - first, int(self.document_lengths[document])
        begin, end = number * self.chunk_length, min((number + 1) * self.chunk_length, whole)
        gives_one = parts > 1 and whole % self.chunk_length == 1
        begin -= gives_one and number == parts - 1
        end -= gives_one and number == parts - 2
        return document, begin, end - begin, number == parts - 1
