"""Read csv and tsv, with the quoting that is declared.

`quoting` "csv" means that a field may stand in double quotes and may then hold delimiters and newlines; "none" means
that a quote is a letter like any other. Csv files default to "csv". A tsv file needs no statement until a field begins
with a quote: from there on the two readings differ, and reading stops with an error that asks which one is meant.

Every value is a string. A record with too many or too few columns is a bad row; a quote that is never closed, or is
followed by a letter, is an error even where bad rows are skipped, since nobody can say where the next record begins.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject
from megatron_xmtf.prompts.readers.streams import MAX_LINE_BYTES, Lines
from megatron_xmtf.prompts.readers.text_lines import decode_line
from megatron_xmtf.prompts.sources import Quoting

__all__ = ["read_table"]

Record = tuple[int, list[str], BadRowError | None]
"""(first line, values, what is wrong with the text of its lines)."""


def read_table(
    path: Path,
    lines: Lines,
    reject: Reject,
    *,
    delimiter: str,
    quoting: Quoting | None,
    columns: Sequence[str] | None,
) -> LocatedRows:
    """Read csv or tsv; without `columns` the first record is the header."""
    if quoting == "csv":
        records = _quoted_records(path, lines, delimiter)
    else:
        records = _plain_records(path, lines, delimiter, refuse_quotes=quoting is None)
    for number, values, fault in records:
        if columns is None:
            columns = _header(path, number, values, fault)
            continue
        if fault is None and len(values) != len(columns):
            fault = BadRowError(
                "wrong number of columns",
                f"{path}:{number} has {len(values)} columns where {len(columns)} are expected "
                f"({', '.join(columns)}); check delimiter={delimiter!r} and quoting={quoting!r}.",
            )
        if fault is not None:
            reject(fault)
            continue
        yield f"{path}:{number}", dict(zip(columns, values, strict=True))


def _header(path: Path, number: int, values: list[str], fault: BadRowError | None) -> list[str]:
    if fault is not None:
        raise fault
    twice = sorted({name for name in values if values.count(name) > 1})
    if twice:
        raise RecordError(f"{path}:{number}: the header names {twice[0]!r} twice; declare columns.")
    return values


def _plain_records(path: Path, lines: Lines, delimiter: str, *, refuse_quotes: bool) -> Iterator[Record]:
    for number, line in lines:
        try:
            text = decode_line(line, f"{path}:{number}").removesuffix("\n").removesuffix("\r")
        except BadRowError as error:
            yield number, [], error
            continue
        if not text:
            continue
        values = text.split(delimiter)
        if refuse_quotes and '"' in text and any(value.startswith('"') for value in values):
            raise RecordError(
                f"{path}:{number}: a field begins with a double quote; declare quoting: csv (quotes enclose "
                "fields) or none (a quote is a letter)."
            )
        yield number, values, None


def _quoted_records(path: Path, lines: Lines, delimiter: str) -> Iterator[Record]:
    # A setting of the csv module, not of a reader; its default of 128 KiB cuts off ordinary documents.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    faults: list[BadRowError] = []

    def texts() -> Iterator[str]:
        for number, line in lines:
            try:
                yield decode_line(line, f"{path}:{number}")
            except BadRowError as error:
                # The line keeps its quotes, so that the record around it ends where it should.
                faults.append(error)
                yield line.decode("utf-8", "replace").replace("\0", "")

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    start = 1
    try:
        for values in reader:
            if values:
                yield start, values, faults[0] if faults else None
            faults.clear()
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(
            f"{path}:{start}: the record that starts here cannot be read: {error}; if quotes are plain letters "
            "in this file, declare quoting: none."
        ) from error
