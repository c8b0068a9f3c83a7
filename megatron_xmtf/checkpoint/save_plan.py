"""Plan a save: which rank writes which part of which tensor, without touching the disk.

    sharded state  ->  replicas dealt evenly to the data-parallel ranks  ->  items of this rank, described on rank 0
    boxes of the distributed optimizer, which are nobody else's          ->  the same

Megatron-Core's own `save` writes `common.pt` and makes directories while it plans, on single ranks: an error there
leaves the others in a collective until its timeout. Here planning is collectives alone and writing is files alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megatron_xmtf.checkpoint.agreement import gather
from megatron_xmtf.checkpoint.optimizer_shards import StateBox
from megatron_xmtf.checkpoint.safe_read import tiling_problem
from megatron_xmtf.checkpoint.shard_writer import ShardItem
from megatron_xmtf.checkpoint.state import TrainingState

__all__ = ["PlannedSave", "ShardPlanner"]


@dataclass(frozen=True)
class PlannedSave:
    """One rank's part of a checkpoint."""

    items: list[ShardItem]
    """What this rank writes; tensors are those of the running training, where they are."""
    common: dict[str, Any]
    """What is the same on all ranks, and written once."""
    metadata: Metadata | None
    """What describes all ranks' chunks, without their places in files; on rank 0 alone."""

    @property
    def bytes(self) -> int:
        """Bytes of the data that this rank writes."""
        return sum(data.nbytes if isinstance(data, torch.Tensor) else len(data) for _, data in self.items)


class ShardPlanner:
    """Plans the saves of one run; what does not change from save to save is worked out once."""

    def __init__(self) -> None:
        self._parallel: FullyParallelSaveStrategyWrapper | None = None
        self._described_boxes: dict[str, TensorStorageMetadata] = {}

    def plan(self, state: TrainingState) -> PlannedSave:
        """Return this rank's part of the state; every rank calls it.

        Args:    state: the same names and shapes every time.
        """
        first = self._parallel is None
        if self._parallel is None:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._parallel = FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), group, do_cache_distribution=True
            )
        sharded, common = save_preprocess(state.sharded, validate_access_integrity=first)
        self._parallel.apply_saving_parallelization(sharded)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        collector = _ItemCollector()
        (_, metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(named, False),
            collector,
            None,
            0,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        if metadata is not None:
            # Every rank's plan, for plans kept from run to run, which this project does not keep: half of the file.
            metadata.__dict__.pop("all_local_plans", None)
        boxes = [box for box in state.boxes if box.is_main]
        if first:
            self._described_boxes = _describe(boxes)
        if metadata is not None:
            metadata.state_dict_metadata.update(self._described_boxes)
        items: list[ShardItem] = [(MetadataIndex(box.key, box.offsets), box.data.detach()) for box in boxes]
        return PlannedSave(collector.items + items, common, metadata)


def _describe(boxes: Sequence[StateBox]) -> dict[str, TensorStorageMetadata]:
    """Return what all ranks' boxes make; every rank calls it. What a rank holds does not change within a run."""
    parts = gather([(box.key, box.shape, box.data.dtype, box.offsets, tuple(box.data.shape)) for box in boxes])
    described: dict[str, TensorStorageMetadata] = {}
    for key, shape, dtype, offsets, sizes in chain.from_iterable(parts):
        properties = TensorProperties(dtype=dtype)
        entry = described.setdefault(key, TensorStorageMetadata(properties, torch.Size(shape), []))
        assert entry.size == torch.Size(shape) and entry.properties.dtype == dtype, f"ranks differ about {key}"
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    for key, entry in described.items():
        problem = tiling_problem(entry)
        assert problem is None, f"{key} {problem}"
    return described


class _ItemCollector:
    """The part of torch's StorageWriter that planning calls; it only takes note."""

    can_run_decentralized_global_plan = True

    def __init__(self) -> None:
        self.items: list[ShardItem] = []

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing is set up before all ranks have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan as it is."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan as it is."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Take the data of each item out of the state."""
        for item in plan.items:
            data = planner.resolve_data(item)
            self.items.append((item.index, data.getvalue() if isinstance(data, io.BytesIO) else data.detach()))
