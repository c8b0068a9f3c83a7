"""Rows of several sources with their ids: the field `id`, else the source's name and the row's number in it.

val.et.jsonl, row 0    {"id": "431", "text": "..."}    431
val.et.jsonl, row 1    {"text": "..."}                 val.et.jsonl:1
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from megatron_xmtf.files import require_directory, require_file
from megatron_xmtf.prompts.readers.bad_rows import OnBadRow, RowReport
from megatron_xmtf.prompts.rows import read_rows
from megatron_xmtf.prompts.sources import Source

__all__ = ["identified_rows", "require_sources", "size_of_sources"]


def identified_rows(
    sources: Sequence[Source],
    *,
    limit: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_bad_row: OnBadRow = "raise",
    report: RowReport | None = None,
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Read sources one after the other.

    Args:    limit: rows read in all. on_bytes, on_bad_row, report: as `read_rows`.
    """
    names = [_names(source)[0] for source in sources]
    report = report if report is not None else RowReport()
    remaining = limit
    for source in sources:
        short, long = _names(source)
        label = short if names.count(short) == 1 else long
        with closing(read_rows(source, on_bytes=on_bytes, on_bad_row=on_bad_row, report=report)) as rows:
            before, read_before = report.rows + report.left_out, report.rows
            for row in islice(rows, remaining):
                # The number is that of the row in the file, whatever is filtered: two filters on one file make no
                # two rows of one id.
                number = report.rows + report.left_out - before - 1
                yield str(row["id"]) if "id" in row else f"{label}:{number}", row
        if remaining is not None:
            remaining -= report.rows - read_before
            if not remaining:
                return


def require_sources(sources: Sequence[Source]) -> None:
    """Check that every file and directory is there, before anything is read.

    Raises:  MissingError: one is not.
    """
    for source in sources:
        for path in source.paths:
            if source.resolved_format() == "huggingface":
                require_directory(path)
            else:
                require_file(path)


def size_of_sources(sources: Sequence[Source]) -> int:
    """Return the bytes of the files; of directories and of datasets on the hub they are not known, and count 0."""
    return sum(path.stat().st_size for source in sources for path in source.paths if path.is_file())


def _names(source: Source) -> tuple[str, str]:
    """Return a short and a longer name for a source's rows."""
    if not source.paths:
        parts = [part for part in (source.hub, source.name, source.split) if part]
        return "/".join(parts), "/".join(parts)
    first = source.paths[0]
    return first.name, f"{first.parent.name}/{first.name}"
