"""Deal rows to data-parallel ranks and micro-batches: a pure function of the step.

    global_batch_size 8, micro_batch_size 2, data_parallel_size 2, step 3: rows 24..31
                     micro-batch 0   micro-batch 1
    rank 0           24 25           28 29
    rank 1           26 27           30 31

The rows of a step are the same whatever the micro-batch size and the number of ranks, and nothing is remembered between
steps: a run resumed at step n reads what the uninterrupted one reads.
"""

from __future__ import annotations

from megatron_xmtf.data.batch import Batch, LossNormalization, build_batch
from megatron_xmtf.data.rows import PackedRows, empty_row
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.errors import ConfigError, DatasetError

__all__ = ["BatchLoader", "require_even_deal", "validation_batches"]


class BatchLoader:
    """The micro-batches of one data-parallel rank.

    Args:    micro_batch_size: rows of one forward pass. global_batch_size: rows of a step over all ranks.
             data_parallel_rank, data_parallel_size: which share of each step is read.
    Raises:  ConfigError: the global batch cannot be dealt evenly.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        normalization: LossNormalization,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size, f"rank {data_parallel_rank} of {data_parallel_size}"
        require_even_deal(global_batch_size, micro_batch_size, data_parallel_size)
        self.rows = rows
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.normalization = normalization

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def micro_batches(self, step: int) -> list[Batch]:
        """Read this rank's micro-batches of a step, which counts from 0.

        Raises:  DatasetError: the index has no rows for this step.
        """
        assert step >= 0, f"steps count from 0; this is {step}"
        begin = step * self.global_batch_size
        if begin + self.global_batch_size > len(self.rows):
            raise DatasetError(
                f"step {step} reads rows {begin} to {begin + self.global_batch_size - 1}, the packing index has "
                f"{len(self.rows)}; build it for the whole run with `xmtf pack CONFIG`."
            )
        counts = None
        if self.normalization == "dataset":
            counts = count_target_tokens(self.rows, begin, count=self.global_batch_size)
        batches = []
        for micro_batch in range(self.num_micro_batches):
            place = micro_batch * self.data_parallel_size + self.data_parallel_rank
            first = begin + place * self.micro_batch_size
            rows = [self.rows[row] for row in range(first, first + self.micro_batch_size)]
            batches.append(build_batch(rows, normalization=self.normalization, dataset_target_tokens=counts))
        return batches


def require_even_deal(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> None:
    """Check that a global batch is a whole number of micro-batches for every data-parallel rank.

    Raises:  ConfigError: it is not; names the nearest sizes that are.
    """
    share = micro_batch_size * data_parallel_size
    if global_batch_size % share == 0:
        return
    below = global_batch_size // share * share
    nearest = f"{below} or {below + share}" if below else str(share)
    raise ConfigError(
        f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x data_parallel_size = "
        f"{micro_batch_size} x {data_parallel_size}; use {nearest}."
    )


def validation_batches(
    rows: PackedRows,
    *,
    num_rows: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    normalization: LossNormalization,
) -> list[Batch]:
    """Read this rank's share of the first rows, each row on exactly one rank.

    Args:    num_rows: rows to measure; fewer if there are fewer. Rows of padding, which weigh nothing, complete the
             last micro-batches, so that what is measured does not depend on the layout.
    Returns: equally many micro-batches on every rank.
    """
    num_rows = min(num_rows, len(rows))
    share = micro_batch_size * data_parallel_size
    padding = empty_row(sequence_length=rows.sequence_length, pad_id=rows.pad_id)
    batches = []
    for micro_batch in range(-(-num_rows // share)):
        first = micro_batch * share + data_parallel_rank * micro_batch_size
        chosen = [rows[row] if row < num_rows else padding for row in range(first, first + micro_batch_size)]
        batches.append(build_batch(chosen, normalization=normalization))
    return batches
