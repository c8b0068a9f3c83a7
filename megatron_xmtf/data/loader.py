"""Deal rows to data-parallel ranks and micro-batches: a pure function of the step.

    global_batch_size 8, micro_batch_size 2, data_parallel_size 2, step 3: rows 24..31
                     micro-batch 0   micro-batch 1
    rank 0           24 25           28 29
    rank 1           26 27           30 31

Under a batch-size ramp a step has fewer rows and each rank fewer micro-batches (`config/step_rows.py`). The rows of a
step are the same whatever the micro-batch size and the number of ranks, and nothing is remembered between
steps: a run resumed at step n reads what the uninterrupted one reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.batch import Batch, LossNormalization, build_batch
from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch, build_encoder_decoder_batch
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRows
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.errors import ConfigError, DatasetError

__all__ = ["AnyBatch", "AnyRows", "BatchLoader", "read_micro_batch", "require_even_deal", "validation_batches"]

AnyRows = PackedRows | EncoderDecoderRows
AnyBatch = Batch | EncoderDecoderBatch


class BatchLoader:
    """The micro-batches of one data-parallel rank.

    Args:    micro_batch_size: rows of one forward pass. step_rows: which rows each step reads, over all ranks.
             data_parallel_rank, data_parallel_size: which share of each step is read. prefix_lm: see `build_batch`.
    Raises:  ConfigError: a global batch cannot be dealt evenly.
    """

    def __init__(
        self,
        rows: AnyRows,
        *,
        micro_batch_size: int,
        step_rows: StepRows,
        data_parallel_rank: int,
        data_parallel_size: int,
        normalization: LossNormalization,
        prefix_lm: bool = False,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size, f"rank {data_parallel_rank} of {data_parallel_size}"
        require_even_deal(step_rows, micro_batch_size, data_parallel_size)
        self.rows = rows
        self.micro_batch_size, self.step_rows = micro_batch_size, step_rows
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.normalization, self.prefix_lm = normalization, prefix_lm

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """Read this rank's micro-batches of a step, which counts from 0.

        Raises:  DatasetError: the index has no rows for this step.
        """
        assert step >= 0, f"steps count from 0; this is {step}"
        begin, size = self.step_rows.before(step), self.step_rows.of(step)
        if begin + size > len(self.rows):
            raise DatasetError(
                f"step {step} reads rows {begin} to {begin + size - 1}, the packing index has "
                f"{len(self.rows)}; build it for the whole run with `xmtf pack CONFIG`."
            )
        counts = None
        if self.normalization == "dataset":
            counts = count_target_tokens(self.rows, begin, count=size)
        batches: list[AnyBatch] = []
        for micro_batch in range(size // (self.micro_batch_size * self.data_parallel_size)):
            place = micro_batch * self.data_parallel_size + self.data_parallel_rank
            first = begin + place * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)
            batch = read_micro_batch(
                self.rows, numbers, normalization=self.normalization, counts=counts, prefix_lm=self.prefix_lm
            )
            batches.append(batch)
        return batches


def read_micro_batch(
    rows: AnyRows,
    numbers: Sequence[int],
    *,
    normalization: LossNormalization,
    counts: NDArray[np.int64] | None = None,
    prefix_lm: bool = False,
) -> AnyBatch:
    """Read the rows of a micro-batch and build it; a number at or beyond the end is a row of padding.

    Args:    counts: target tokens of each dataset in the global batch, for the normalization `dataset`.
             prefix_lm: of rows of one line, see `build_batch`.
    """
    if isinstance(rows, EncoderDecoderRows):
        two_sided = [rows[row] if row < len(rows) else rows.empty() for row in numbers]
        return build_encoder_decoder_batch(two_sided, normalization=normalization, dataset_target_tokens=counts)
    packed = [rows[row] if row < len(rows) else rows.empty() for row in numbers]
    return build_batch(packed, normalization=normalization, dataset_target_tokens=counts, prefix_lm=prefix_lm)


def require_even_deal(step_rows: StepRows, micro_batch_size: int, data_parallel_size: int) -> None:
    """Check that every global batch is a whole number of micro-batches for every data-parallel rank.

    Raises:  ConfigError: one is not; names the nearest sizes that are.
    """
    share = micro_batch_size * data_parallel_size
    settings = [("global_batch_size", step_rows.global_batch_size)]
    if step_rows.rampup_rows:
        # Every size of the ramp is start + n x increment: these two decide.
        settings += [
            ("rampup_batch_size.start", step_rows.start),
            ("rampup_batch_size.increment", step_rows.increment),
        ]
    for name, size in settings:
        if size % share:
            below = size // share * share
            nearest = f"{below} or {below + share}" if below else str(share)
            raise ConfigError(
                f"{name}={size} is not a multiple of micro_batch_size x data_parallel_size = "
                f"{micro_batch_size} x {data_parallel_size}; use {nearest}."
            )


def validation_batches(
    rows: AnyRows,
    *,
    num_rows: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    normalization: LossNormalization,
    prefix_lm: bool = False,
) -> list[AnyBatch]:
    """Read this rank's share of the first rows, each row on exactly one rank.

    Args:    num_rows: rows to measure; fewer if there are fewer. Rows of padding, which weigh nothing, complete the
             last micro-batches, so that what is measured does not depend on the layout.
    Returns: equally many micro-batches on every rank.
    """
    num_rows = min(num_rows, len(rows))
    share = micro_batch_size * data_parallel_size
    padding = len(rows)
    batches: list[AnyBatch] = []
    for micro_batch in range(-(-num_rows // share)):
        first = micro_batch * share + data_parallel_rank * micro_batch_size
        chosen = [row if row < num_rows else padding for row in range(first, first + micro_batch_size)]
        batches.append(read_micro_batch(rows, chosen, normalization=normalization, prefix_lm=prefix_lm))
    return batches
