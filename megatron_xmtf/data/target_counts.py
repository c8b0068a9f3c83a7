"""Count the target tokens of each dataset in a run of rows, from lengths alone: no token is read.

    rows of a step    row 0: squad (inputs 5, targets 2), xnli (4, 1)      row 1: a text of 7 tokens, wiki
    counts            squad 2     xnli 1     wiki 6                        a text's first token is not predicted

Every rank has the index and the lengths of all examples, so each knows the counts of the whole global batch without
asking the others. Invariant: the counts are those of `build_batch` over the same rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.fitting import segment_tokens
from megatron_xmtf.data.rows import IndexedRows

__all__ = ["count_target_tokens"]


def count_target_tokens(rows: IndexedRows, first: int, *, count: int) -> NDArray[np.int64]:
    """Return the predicted target tokens of each dataset in rows `first` to `first + count - 1`, int64 [datasets]."""
    index = rows.index
    segments = slice(int(index.row_offsets[first]), int(index.row_offsets[first + count]))
    dataset_ids, example_ids = np.asarray(index.dataset_ids[segments]), np.asarray(index.example_ids[segments])
    counts = np.zeros(len(rows.datasets), np.int64)
    for number in np.unique(dataset_ids).tolist():
        own = np.flatnonzero(dataset_ids == number)
        examples, places = example_ids[own].astype(np.int64), own + segments.start
        tokens = segment_tokens(rows.datasets[number], examples, lengths=index.row_lengths, places=places)
        counts[number] = tokens[1].sum()
    return counts
