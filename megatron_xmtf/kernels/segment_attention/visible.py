"""Who sees whom in packed rows, as a range of keys for each query; computed on the device, which nobody waits for.

Every pattern of this project is one range a query, since segments are runs and stand in rising order:

    segment_ids            1  1  1  1  2  2  0     key_begin    0  0  0  0  4  4  7     padding sees nothing:
    causal                                         key_end      1  2  3  4  5  6  0     begin = keys, end = 0
    prefix-LM, prefix_mask 1  1  0  0  1  0  0     key_end      2  2  3  4  5  6  0
    bidirectional                                  key_end      4  4  4  4  6  6  0
    cross, of decoder 1 2 2 0 to these keys        key_begin 0 4 4 7, key_end 4 6 6 0

query_begin and query_end bound the queries that may see a key, for the gradients of keys and values: whole blocks of
queries outside of them are not visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["VisibleRanges", "cross_ranges", "self_ranges"]

ABOVE_ALL_SEGMENTS = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class VisibleRanges:
    """Ranges of a micro-batch, the same for every layer and head; each int32, contiguous."""

    key_begin: Tensor
    """[b, q]: the first key that a query sees; the number of keys if it sees none."""
    key_end: Tensor
    """[b, q]: one past the last; 0 if it sees none."""
    query_begin: Tensor
    """[b, k]: no earlier query sees this key."""
    query_end: Tensor
    """[b, k]: no query from here on sees this key."""


def self_ranges(segment_ids: Tensor, *, causal: bool, prefix_mask: Tensor | None = None) -> VisibleRanges:
    """Find what each token of a row sees of that row.

    Args:    segment_ids: int [b, s], rising, padding (0) at the end. causal: keys after their query are not seen, but
             for those of `prefix_mask`, bool [b, s], which begin a segment and are seen by all of it.
    """
    sequence = segment_ids.size(1)
    begin, end = _runs(segment_ids, segment_ids)
    real = segment_ids > 0
    if not causal:
        return _ranges(begin, end, begin.masked_fill(~real, sequence), end)
    place = torch.arange(sequence, device=segment_ids.device).expand_as(begin)
    key_end, query_begin = place + 1, place
    if prefix_mask is not None:
        # The prefix of the own segment or, where that has none, of an earlier one, which ends before this token.
        prefix_end = torch.where(prefix_mask & real, key_end, 0).cummax(dim=1).values
        key_end = key_end.maximum(prefix_end.gather(1, (end - 1).clamp(min=0)))
        query_begin = torch.where(prefix_mask, begin, place)
    return _ranges(begin, key_end.masked_fill(~real, 0), query_begin.masked_fill(~real, sequence), end)


def cross_ranges(queries: Tensor, keys: Tensor) -> VisibleRanges:
    """Find what queries see of other rows' segments of the same number: int [b, q] and [b, k], as above."""
    return _ranges(*_runs(queries, keys), *_runs(keys, queries))


def _runs(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the run of each token's segment begins and ends in `others`; for padding its length and 0."""
    rising = others.long().masked_fill(others == 0, ABOVE_ALL_SEGMENTS).contiguous()
    # Checked on the device: a look at the values would wait for it.
    torch._assert_async(
        (rising[:, 1:] >= rising[:, :-1]).all(), "segments of a packed row rise, and padding (0) stands at its end"
    )
    wanted = own.long().contiguous()
    begin, end = (torch.searchsorted(rising, wanted, right=right) for right in (False, True))
    # A segment that `others` lacks has an empty run, whose begin may lie anywhere.
    is_empty = (wanted == 0) | (begin >= end)
    return begin.masked_fill(is_empty, others.size(1)), end.masked_fill(is_empty, 0)


def _ranges(*bounds: Tensor) -> VisibleRanges:
    return VisibleRanges(*(bound.to(torch.int32).contiguous() for bound in bounds))
