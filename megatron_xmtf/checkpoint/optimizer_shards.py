"""State of the distributed optimizer as each rank holds it: stretches of flattened parameters, stored as boxes.

Megatron-Core's distributed optimizer (ZeRO-1) cuts a buffer of flattened parameters evenly, in the middle of a matrix
and of a row. A stretch of a matrix is at most three boxes, and torch_dist stores a tensor in boxes of any size, so
that each rank writes and reads its own part under the parameter's name, at any layout, and nothing is gathered:

    parameter [4, 3]      rank 0 holds [0, 7)                rank 1 holds [7, 12)
     0  1  2               0  1  2   box at (0, 0), [2, 3]    .  .  .
     3  4  5               3  4  5                            .  .  .
     6  7  8               6  .  .   box at (2, 0), [1, 1]    .  7  8   box at (2, 1), [1, 2]
     9 10 11               .  .  .                            9 10 11   box at (3, 0), [1, 3]

Megatron-Core's own format that any layout reads, `fully_reshardable`, gathers all state on every rank before each
save and takes the memory of all of it on each rank at a load; this one has its names, and it reads this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_xmtf.checkpoint.reader import CheckpointReader

__all__ = ["StateBox", "distributed_part", "flat_boxes", "optimizer_boxes", "read_boxes"]


@dataclass(frozen=True)
class StateBox:
    """A box of a global tensor that this rank holds."""

    key: str
    """Name of the global tensor: `optimizer.state.exp_avg.<parameter>`."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]
    """Where the box begins in it."""
    data: Tensor
    """View of the optimizer's own state, of the box's shape: written to by a load, read by a save."""
    is_main: bool
    """Whether this rank stores it; others hold it too where a parameter is whole on several tensor-parallel ranks or
    tied between pipeline stages."""


def distributed_part(optimizer: MegatronOptimizer | None) -> DistributedOptimizer | None:
    """Return the distributed optimizer within `optimizer`, None if it is of another kind."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    found = [part for part in parts if isinstance(part, DistributedOptimizer)]
    assert not found or len(parts) == 1, "dense models have one optimizer"
    return found[0] if found else None


def flat_boxes(start: int, end: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements [start, end) of a flattened tensor into boxes, in order; yield the offsets and sizes of each.

    >>> list(flat_boxes(1, 8, (4, 3)))
    [((0, 1), (1, 2)), ((1, 0), (1, 3)), ((2, 0), (1, 2))]
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    first, last = -(-start // inner), end // inner  # whole rows [first, last)
    if first > last:  # within one row
        for offsets, sizes in flat_boxes(start - last * inner, end - last * inner, shape[1:]):
            yield (last, *offsets), (1, *sizes)
        return
    for offsets, sizes in flat_boxes(start - (first - 1) * inner, inner, shape[1:]):
        yield (first - 1, *offsets), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offsets, sizes in flat_boxes(0, end - last * inner, shape[1:]):
        yield (last, *offsets), (1, *sizes)


def optimizer_boxes(optimizer: DistributedOptimizer, weights: dict[str, Any]) -> list[StateBox]:
    """Return all that this rank holds of the optimizer's state, the same names in the same order every time.

    Main parameters of an fp32 run are views of the weights, which a checkpoint holds anyway, and are left out.

    Args:    weights: the model's sharded state dict, with the parameters themselves in it.
    """
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    place_of = {value.data: value for chunk in sharded.values() for value in chunk.values()}
    boxes: list[StateBox] = []
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, spans in bucket["param_map"].items():
                    state = dict(optimizer._get_main_param_and_optimizer_states(parameter))
                    main = state.pop("param")
                    if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                        state["fp32_param"] = main
                    for name, flat in state.items():
                        boxes += _boxes_of(place_of[parameter], f"optimizer.state.{name}", flat, spans["param"].start)
    return boxes


def _boxes_of(place: ShardedTensor | ShardedTensorFactory, prefix: str, flat: Tensor, start: int) -> Iterator[StateBox]:
    """Cut one stretch into boxes of the global tensor.

    Args:    place: of the parameter. flat: [stretch], elements of the flattened local parameter from `start` on.
    """
    first = 0  # element of the local parameter where a part begins
    for part in _local_parts(place):
        numel = part.data.numel()
        low, high = max(start, first), min(start + flat.numel(), first + numel)
        position = low - start
        for offsets, sizes in flat_boxes(low - first, high - first, part.local_shape):
            data = flat[position : position + torch.Size(sizes).numel()].view(sizes)
            position += data.numel()
            yield StateBox(
                key=f"{prefix}.{part.key}",
                shape=tuple(part.global_shape),
                offsets=tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)),
                data=data,
                is_main=tuple(part.replica_id[:2]) == (0, 0),
            )
        first += numel


def _local_parts(place: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return where the local parameter lies in the global one; a gated layer's two halves lie apart.

    gate and value, [2 r, c] on this rank: rows [0, r) of the first half, rows [r, 2 r) of the second
    """
    if isinstance(place, ShardedTensor):
        parts = [place]
    else:
        parts = list(place.build())
        row = parts[0].data[0].numel()
        places = [part.data.storage_offset() - place.data.storage_offset() for part in parts]
        assert places == [row * sum(p.data.size(0) for p in parts[:i]) for i in range(len(parts))], "rows in order"
    assert all(part.prepend_axis_num == 0 and part.flattened_range is None for part in parts), place.key
    return parts


@torch.no_grad()
def read_boxes(reader: CheckpointReader, boxes: Sequence[StateBox]) -> None:
    """Fill this rank's state from a checkpoint that was written at any layout.

    Rows of words that only this run's padding has keep their value.

    Raises:  CorruptCheckpointError: a tensor is missing or its chunks cannot be read.
    """
    # In the order of the file: neighbours on the disk are read one after another.
    for box in sorted(boxes, key=lambda box: reader.first_place(box.key)):
        reader.read_into(box.key, box.data, offsets=box.offsets)
