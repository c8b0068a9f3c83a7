"""Read parquet files a batch at a time; what becomes of each type is told in `arrow_values.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.arrow_values import batch_rows, check_schema
from megatron_xmtf.prompts.readers.bad_rows import LocatedRows, Reject

__all__ = ["read_parquet"]

BATCH_BYTES = 32 << 20
BATCH_ROWS = 128
"""A batch has as many rows as fit in 32 MiB at the mean size that the file states, and at most these: few, because a
dictionary can make one long text stand in every row. A thousand would read a tenth faster."""


def read_parquet(
    path: Path, reject: Reject, *, columns: Sequence[str] | None, on_bytes: Callable[[int], None] | None
) -> LocatedRows:
    """Read the rows of a parquet file, of the columns named.

    Raises:  RecordError: not parquet, damaged or cut off. ConfigError: as `check_schema` says.
    """
    try:
        # A buffer: without one, a whole column of a row group is read at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = check_schema(file.schema_arrow, columns, str(path))
            metadata, size = file.metadata, path.stat().st_size
            total_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
            mean = max(total_bytes // max(metadata.num_rows, 1), 1)
            rows = min(max(BATCH_BYTES // mean, 1), BATCH_ROWS)
            first = reported = 0
            for batch in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
                yield from batch_rows(batch, str(path), first, reject)
                first += batch.num_rows
                if on_bytes is not None:
                    on_bytes(size * first // metadata.num_rows - reported)
                    reported = size * first // metadata.num_rows
            if first != metadata.num_rows:
                raise RecordError(f"{path} says that it has {metadata.num_rows:,} rows, and has {first:,}; damaged.")
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path} is no parquet file, or is damaged or cut off ({error}).") from error
