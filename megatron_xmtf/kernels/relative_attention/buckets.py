"""T5's relative position: key - query, sorted into buckets that grow with the distance.

    distance (key - query)    -128   -9   -8   -7   -1    0    1    7    8    9   127     32 buckets, up to 128
    bidirectional               15    8    8    7    1    0   17   23   24   24    31     encoder: later keys from 16
    causal                      31    9    8    7    1    0    0    0    0    0     0     decoder: later keys are masked

The bias is a function of the distance alone, so one row of 2 L - 1 numbers a head holds it for every segment of up to
L tokens, whatever its place in the row, and its gradient is that small too.

Source:  Raffel et al. 2020, section 2.1; `transformers` 5.23 T5Attention computes the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bias_by_distance", "distance_buckets"]


def distance_buckets(distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each distance, int64.

    Args:    distance: int64, key - query. bidirectional: half of the buckets are for later keys.
             num_buckets: rows of the table. max_distance: from here on all distances share the last bucket.
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # In fp32 and in this order: one rounding otherwise would move a border by one.
    large = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    large = (exact + large.to(torch.int64)).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, large)


def bias_by_distance(table: Tensor, *, length: int, bidirectional: bool, max_distance: int) -> Tensor:
    """Look up the bias of every distance in segments of up to `length` tokens.

    Args:    table: [num_buckets, n], this rank's heads.
    Returns: fp32 [n, 2 * length - 1]; column length - 1 + d is distance d, from -(length - 1) on.
    """
    distance = torch.arange(1 - length, length, device=table.device)
    buckets = distance_buckets(
        distance, bidirectional=bidirectional, num_buckets=table.size(0), max_distance=max_distance
    )
    return table.float()[buckets].t().contiguous()
