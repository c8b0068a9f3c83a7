"""When a run saves, what it keeps, and what becomes of a save that fails.

    after each step   is the save under way done, or failed?  -> publish, prune, export
    every interval    copy the state, begin the next one
    end of the run    wait for it

A save that fails ends the run, on every rank, with the exit code of a full disk or of a failure: to train on without
checkpoints would risk more than it gains, and the one before is whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_xmtf.checkpoint.directory import step_directory
from megatron_xmtf.checkpoint.retention import prune_checkpoints, reap_left_overs
from megatron_xmtf.checkpoint.saver import CheckpointSaver, SaveRequest
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError, NonFiniteError, XmtfError, nearest_names
from megatron_xmtf.training.export_beside import ExportsBeside

__all__ = ["RunCheckpoints"]

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints of one run; every method is called by all ranks together. A context manager.

    Args:    chunks, optimizer: what is trained. hf_files: side files, carried into the first checkpoint.
             is_first: whether this is rank 0, which alone touches finished checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        hf_files: Path,
        is_first: bool,
    ) -> None:
        self._config, self._hf_files, self._is_first = config, hf_files, is_first
        self._directory = Path(config.output) / "checkpoints"
        self._saver = CheckpointSaver(
            chunks,
            optimizer if config.checkpoint.save_optimizer else None,
            timeout_seconds=60 * config.checkpoint.write_timeout_minutes,
        )
        self._exports = ExportsBeside(Path(config.output) / "hf") if is_first else None
        self._newest: Path | None = None
        self._measured: dict[str, float] = {}
        if is_first and self._directory.is_dir():
            reap_left_overs(self._directory)

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no writer behind; `finish` has been called where the run came to its end."""
        if isinstance(error, NonFiniteError):
            # Raised on all ranks together, after the state under way was copied: that one is finite, and is kept.
            try:
                self._published(self._saver.finish())
            except XmtfError as second:
                logger.error("the checkpoint under way is lost as well: %s", second)
        self.abandon()

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has published."""
        return self._newest

    def after_step(self, step: int, validation: Mapping[str, float]) -> None:
        """Publish a checkpoint that has been written meanwhile.

        Args:    validation: losses measured after this step; empty: none were.
        Raises:  DiskFullError, CheckpointWriteError: on all ranks. ConfigError: `checkpoint.keep_best.metric` is no
                 name among the losses.
        """
        best = self._config.checkpoint.keep_best
        if best is not None and validation and best.metric not in validation:
            raise ConfigError(
                f"checkpoint.keep_best.metric={best.metric!r} is not measured; {nearest_names(best.metric, validation)}"
            )
        self._measured = dict(validation)
        self._published(self._saver.poll())
        if self._exports is not None:
            self._exports.poll()

    def save(self, step: int) -> Path:
        """Save the current step: return when the state is copied, or all is on the disk without `async_save`.

        Returns: the path where the checkpoint will be.
        Raises:  as `after_step`; ConfigError: the checkpoint exists.
        """
        path = step_directory(self._directory, step)
        self._published(self._saver.finish())  # its tokenizer files are carried on, and it may prune those of before
        self._saver.start(
            SaveRequest(
                path=path,
                step=step,
                config=self._config,
                consumed_rows=self._config.batch.step_rows.before(step),
                hf_files=self._hf_files,
                metrics=self._measured,
            )
        )
        if not self._config.checkpoint.async_save:
            self._published(self._saver.finish())
        return path

    def finish(self) -> Path | None:
        """Wait for the save and the export under way; return the newest checkpoint of this run.

        Raises:  as `after_step`; CheckpointWriteError: an export failed.
        """
        self._published(self._saver.finish())
        if self._config.checkpoint.export_huggingface == "last" and self._newest is not None:
            self._export(self._newest)
        exports = self._exports
        if exports is not None:
            exports.finish()
        return self._newest

    def abandon(self) -> None:
        """End this rank's processes without asking the others, who may be gone."""
        self._saver.abandon()
        if self._exports is not None:
            self._exports.abandon()

    def _published(self, path: Path | None) -> None:
        """Go on from a new checkpoint: its side files from now on, older ones may go."""
        if path is None:
            return
        # The checkpoint that the run was resumed from may be pruned; the newest one never is.
        self._newest, self._hf_files = path, path / "hf"
        keep = self._config.checkpoint
        if keep.export_huggingface == "every":
            self._export(path)
        if self._is_first:
            assert self._exports is not None, "rank 0 exports"
            prune_checkpoints(
                self._directory,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                keep_best=keep.keep_best,
                in_use=self._exports.in_use,
            )

    def _export(self, path: Path) -> None:
        if self._exports is not None:
            self._exports.request(path, step=int(path.name.removeprefix("step_")))
