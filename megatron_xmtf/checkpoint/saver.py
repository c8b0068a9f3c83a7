"""Save beside the training: all ranks stop for the copy alone, and the checkpoint appears whole or not at all.

    start    all ranks   plan, check the disk's space, rank 0 makes step_N.tmp-XXXX, copy, fork a writer each
    poll     all ranks   at the end of a step: has a writer failed? have all written? then publish
    finish   all ranks   wait for that
    publish  rank 0      .metadata, metadata.json, manifest with every file's hash, flush, one rename

A writer that fails, dies or hangs is an error on every rank at the next poll, with the rank and the cause, and
nothing of its checkpoint is left. One save is under way at a time: `start` first finishes the one before.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_xmtf.checkpoint.agreement import Failure, from_rank_zero, gather, raise_write_failures
from megatron_xmtf.checkpoint.manifest import FileEntry, begin_checkpoint, discard_checkpoint, finish_checkpoint
from megatron_xmtf.checkpoint.safe_read import FORMATS, METADATA_NAME
from megatron_xmtf.checkpoint.save_plan import PlannedSave, ShardPlanner
from megatron_xmtf.checkpoint.shard_writer import ShardItem, ShardWriter, WrittenPart, stage_items
from megatron_xmtf.checkpoint.state import training_state
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import DiskFullError, XmtfError
from megatron_xmtf.files import write_json

__all__ = ["CheckpointSaver", "SaveRequest"]

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""Left free besides the checkpoint's own bytes: its descriptions, metrics.jsonl, the side files."""
WAIT_SECONDS = 0.2
"""How long a rank waits for its own writer before it asks the others; they are never further apart than that."""


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved under which name."""

    path: Path
    """Final directory."""
    step: int
    config: RunConfig
    consumed_rows: int
    """Rows trained on so far."""
    hf_files: Path
    """Directory with config.json and tokenizer files; must stay until the save is done."""
    metrics: Mapping[str, float]
    """Validation losses measured at this step; empty: none were."""


@dataclass(frozen=True)
class _Underway:
    """A save whose writers run."""

    request: SaveRequest
    temporary: Path
    writer: ShardWriter | Failure
    metadata: Metadata | None
    fields: Mapping[str, Any]
    """What the manifest says besides the request."""
    staged: Sequence[ShardItem]
    """Kept while the writer reads them; see `stage_items`."""


class CheckpointSaver:
    """One rank's part in saving a run's checkpoints; every method is called by all ranks together.

    Args:    chunks, optimizer: what is saved; optimizer None leaves its state and RNG states out.
             timeout_seconds: how long a writer may take.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, timeout_seconds: float = 1800.0
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._timeout_seconds = timeout_seconds
        self._planner = ShardPlanner()
        self._underway: _Underway | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._underway is not None

    def start(self, request: SaveRequest) -> Path | None:
        """Copy the state and begin to write it; return the checkpoint that had to be finished first, if any.

        Raises:  ConfigError: `path` exists. DiskFullError: it would not fit, or as `finish`.
        """
        before = self.finish()
        started = time.monotonic()
        planned = self._planner.plan(training_state(self._chunks, self._optimizer))
        temporary = self._make_room(request.path, planned)
        staged = stage_items(planned.items)
        architecture = unwrap_model(self._chunks[0]).architecture
        is_first = torch.distributed.get_rank() == 0
        writer: ShardWriter | Failure
        try:
            writer = ShardWriter(
                temporary,
                rank=torch.distributed.get_rank(),
                items=staged,
                common=planned.common if is_first else None,
                side_files=request.hf_files if is_first else None,
                timeout_seconds=self._timeout_seconds,
            )
        except OSError as error:
            writer = replace(Failure.of(error), message=f"no writer could be started: {error}")
        fields = {
            "architecture": architecture.to_mapping(),
            "dtype": str(next(self._chunks[0].parameters()).dtype).removeprefix("torch."),
            "contents": ["model"] if self._optimizer is None else ["model", "optimizer", "rng"],
        }
        self._underway = _Underway(request, temporary, writer, planned.metadata, fields, staged)
        logger.debug("training waited %.3f s for the copy of step %d", time.monotonic() - started, request.step)
        return before

    def poll(self) -> Path | None:
        """Publish the checkpoint under way if all ranks have written it, and return its path.

        Raises:  DiskFullError, CheckpointWriteError: on all ranks, if one of them could not write.
        """
        if self._underway is None or not self._agree(0.0):
            return None
        return self._publish(self._underway)

    def finish(self) -> Path | None:
        """Wait for the checkpoint under way, publish it and return its path; None if there is none.

        Raises:  as `poll`. It waits at most for `timeout_seconds` from the start of the save.
        """
        if self._underway is None:
            return None
        while not self._agree(WAIT_SECONDS):
            pass
        return self._publish(self._underway)

    def abandon(self) -> None:
        """End this rank's writer and forget the save; no other rank is asked, for they may be gone."""
        underway, self._underway = self._underway, None
        if underway is None:
            return
        if isinstance(underway.writer, ShardWriter):
            underway.writer.kill()
        if torch.distributed.get_rank() == 0:
            discard_checkpoint(underway.temporary)

    def _make_room(self, path: Path, planned: PlannedSave) -> Path:
        """Check that the checkpoint fits on the disk, and make its temporary directory."""
        needed = sum(gather(planned.bytes)) + SPARE_BYTES

        def begin() -> str:
            existing = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
            free = shutil.disk_usage(existing).free
            if free < needed:
                raise DiskFullError(
                    f"checkpoint {path} needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; nothing "
                    "was written, and the checkpoints before it are untouched. Free space, or keep fewer "
                    "(checkpoint.keep_last, keep_every), and start the same command again: it resumes."
                )
            return str(begin_checkpoint(path))

        try:
            return Path(from_rank_zero(begin))
        except DiskFullError:
            raise
        except OSError as error:  # on all ranks
            raise_write_failures({0: Failure.of(error)}, f"checkpoint {path}")
            raise

    def _agree(self, seconds: float) -> bool:
        """Whether all ranks have written.

        Args:    seconds: longest wait for this rank's own writer.
        Raises:  DiskFullError, CheckpointWriteError: on all ranks, as soon as one has failed.
        """
        underway = self._underway
        assert underway is not None, "asked without a save"
        writer = underway.writer
        outcome = writer if isinstance(writer, Failure) else writer.poll(seconds)
        flags = torch.tensor([outcome is None, isinstance(outcome, Failure)], dtype=torch.int32)
        flags = flags.to(next(self._chunks[0].parameters()).device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        some_write, some_failed = flags.tolist()
        if some_failed:
            if isinstance(writer, ShardWriter):
                writer.kill()
            failures = gather(outcome if isinstance(outcome, Failure) else None)
            self.abandon()  # now that no rank writes
            raise_write_failures(
                {rank: failure for rank, failure in enumerate(failures) if failure is not None},
                f"checkpoint {underway.request.path}",
            )
        return not some_write

    def _publish(self, underway: _Underway) -> Path:
        """Describe what all ranks have written, and give it its name."""
        assert isinstance(underway.writer, ShardWriter), "a failed save is not published"
        request, own = underway.request, underway.writer.poll()
        assert isinstance(own, WrittenPart), "all ranks have written"
        self._underway = None
        parts: list[WrittenPart] = gather(own)
        try:
            from_rank_zero(lambda: self._name(underway, parts))
        except (OSError, XmtfError) as error:  # on all ranks
            if torch.distributed.get_rank() == 0:
                discard_checkpoint(underway.temporary)
            if isinstance(error, OSError):
                raise_write_failures({0: Failure.of(error)}, f"checkpoint {request.path}")
            raise
        return request.path

    def _name(self, underway: _Underway, parts: Sequence[WrittenPart]) -> None:
        request, temporary, metadata = underway.request, underway.temporary, underway.metadata
        assert metadata is not None, "rank 0 has the description"
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {index: place for part in parts for index, place in part.places.items()}
        metadata.storage_meta = StorageMeta()
        with open(temporary / METADATA_NAME, "wb") as stream:
            pickle.dump(metadata, stream)
        write_json(temporary / "metadata.json", FORMATS)
        written: dict[str, FileEntry] = {name: entry for part in parts for name, entry in part.files.items()}
        finish_checkpoint(
            temporary,
            request.path,
            step=request.step,
            config=request.config.model_dump(mode="json"),
            consumed_rows=request.consumed_rows,
            metrics=request.metrics,
            written=written,
            **underway.fields,
        )
