"""Read the rows of a declared source, one at a time, in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path

from megatron_xmtf.errors import ConfigError, RecordError
from megatron_xmtf.files import require_directory, require_file
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, OnBadRow, Reject, Row, RowReport
from megatron_xmtf.prompts.readers.extras import needs_extra
from megatron_xmtf.prompts.readers.field_map import mapped_row
from megatron_xmtf.prompts.readers.json_rows import read_json_list, read_jsonl
from megatron_xmtf.prompts.readers.natural_instructions import read_natural_instructions
from megatron_xmtf.prompts.readers.question_answering import read_squad, read_tydiqa
from megatron_xmtf.prompts.readers.row_filter import RowFilter
from megatron_xmtf.prompts.readers.streams import read_lines
from megatron_xmtf.prompts.readers.tables import read_table
from megatron_xmtf.prompts.readers.text_lines import read_aligned_lines, read_text_lines
from megatron_xmtf.prompts.sources import Source, SourceFormat

__all__ = ["read_rows"]

OnBytes = Callable[[int], None]


def read_rows(
    source: Source | Path | str,
    *,
    on_bytes: OnBytes | None = None,
    on_bad_row: OnBadRow = "raise",
    report: RowReport | None = None,
) -> Generator[Row, None, None]:
    """Read the rows of a source in order; files of one json document are read whole, all else is streamed.

    Args:    source: what to read; a path alone is read by its suffix.
             on_bytes: called now and then with the bytes of the files consumed since the last call (a progress bar).
             on_bad_row: "skip" counts a row that cannot be read in `report` and goes on. A damaged file always raises.
             report: counts of rows read and rejected, filled while reading.
    Raises:  MissingError: no such file. ConfigError: an impossible declaration, a `where` that no row passes.
             RecordError: a row that cannot be read, or a file that cannot be read on, with file, line and reason;
             every row rejected.
    """
    if not isinstance(source, Source):
        source = Source(Path(source))
    found = source.resolved_format()
    for path in source.paths:
        if found == "huggingface":
            require_directory(path)
        else:
            require_file(path)
    if on_bad_row == "skip" and report is None:
        raise ConfigError(f'{source.label}: on_bad_row="skip" needs a report to count the skipped rows in.')
    return _mapped(source, found, on_bytes, on_bad_row, report if report is not None else RowReport())


def _mapped(
    source: Source, found: SourceFormat, on_bytes: OnBytes | None, on_bad_row: OnBadRow, report: RowReport
) -> Generator[Row, None, None]:
    read_before = report.rows
    first_rejected: list[BadRowError] = []
    row_filter = RowFilter(source.where) if source.where else None
    raise_or_count = report.rejecter(on_bad_row)

    def reject(error: BadRowError) -> None:
        raise_or_count(error)
        if not first_rejected:
            first_rejected.append(error)

    with closing(_located(source, found, on_bytes, reject)) as rows:
        for where, row in rows:
            try:
                if row_filter is not None and not row_filter.passes(row, where):
                    report.left_out += 1
                    continue
                row = mapped_row(row, where, fields=source.fields, constants=source.constants)
            except BadRowError as error:
                reject(error)
                continue
            report.rows += 1
            yield row
    if row_filter is not None:
        row_filter.require_some(source.label)
    if report.rows == read_before and first_rejected:
        raise RecordError(
            f"{source.label}: not one row can be read; check the declaration. The first: {first_rejected[0]}"
        )


def _located(source: Source, found: SourceFormat, on_bytes: OnBytes | None, reject: Reject) -> LocatedRows:
    if source.aligned:
        with ExitStack() as stack:
            files = {
                name: (path, stack.enter_context(closing(read_lines(path, member=source.member, on_bytes=on_bytes))))
                for name, path in source.aligned.items()
            }
            yield from read_aligned_lines(files, reject)
        return
    if found == "huggingface":
        with needs_extra(source.label, "a saved dataset"):
            from megatron_xmtf.prompts.readers.huggingface import read_huggingface
        yield from read_huggingface(source, reject, on_bytes=on_bytes)
    for path in source.paths if found != "huggingface" else ():
        yield from _read_file(source, found, path, on_bytes, reject)


def _read_file(
    source: Source, found: SourceFormat, path: Path, on_bytes: OnBytes | None, reject: Reject
) -> LocatedRows:
    if found == "parquet":
        with needs_extra(source.label, "parquet"):
            from megatron_xmtf.prompts.readers.parquet import read_parquet
        return read_parquet(path, reject, columns=source.columns, on_bytes=on_bytes)
    lines = read_lines(path, member=source.member, on_bytes=on_bytes)
    if found == "squad":
        return read_squad(path, lines, reject)
    if found == "tydiqa":
        return read_tydiqa(path, lines, reject)
    if found == "natural_instructions":
        return read_natural_instructions(path, lines, reject)
    if found == "jsonl":
        return read_jsonl(path, lines, reject)
    if found == "json":
        return read_json_list(path, lines, reject, records_at=source.records_at, keys_as=source.keys_as)
    if found == "lines":
        return read_text_lines(path, lines, reject)
    return read_table(
        path,
        lines,
        reject,
        delimiter=source.delimiter or ("," if found == "csv" else "\t"),
        quoting=source.quoting or ("csv" if found == "csv" else None),
        columns=source.columns,
    )
