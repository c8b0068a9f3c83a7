"""Read one file format each: lines, then rows, each with where it stands for error messages.

    read_lines(path)            ->  (1, '{"a": 1}\\n'), (2, ...)
    read_jsonl(path, lines)     ->  ("rows.jsonl:1", {"a": 1}), ...
    read_json_list, read_table  likewise

What is refused, and what quoting means, is told in `sources.py`, which chooses the reader.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from megatron_xmtf.errors import RecordError, nearest_names

__all__ = ["Quoting", "Row", "read_json_list", "read_jsonl", "read_lines", "read_table"]

Quoting = Literal["csv", "none"]
Row = dict[str, Any]
Lines = Iterable[tuple[int, str]]

MAX_LINE_BYTES = 64 << 20
"""Longer lines are refused: a file without newlines must not fill the memory."""
MAX_JSON_BYTES = 512 << 20
"""A json list is read whole (a jsonl file is not); larger ones belong in jsonl."""


def read_lines(path: Path, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its newline), decoded strictly."""
    with open(path, "rb") as raw:
        stream: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        reported = number = 0
        while line := _read_line(stream, path, number + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(
                    f"{path}:{number} is not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1} of the "
                    "line; convert the file (iconv) or remove the line."
                ) from error
            if "\0" in text:
                raise RecordError(f"{path}:{number} holds a NUL character; text may not.")
            if on_bytes is not None and number % 64 == 0:
                on_bytes(raw.tell() - reported)
                reported = raw.tell()
            yield number, text
        if on_bytes is not None:
            on_bytes(raw.tell() - reported)


def _read_line(stream: IO[bytes], path: Path, number: int) -> bytes:
    try:
        line = stream.readline(MAX_LINE_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecordError(f"{path}:{number}: the gzip stream is damaged or cut off ({error}).") from error
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"{path}:{number} is longer than {MAX_LINE_BYTES >> 20} MiB; is this a file of lines?")
    return line


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return row


def _parse_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_pairs)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise RecordError(f"{where} is not valid JSON: {error.msg} at {line}column {error.colno}.") from error
    except ValueError as error:
        raise RecordError(f"{where} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise RecordError(f"{where} is nested too deeply to be read.") from error
    # Only an escape can bring what the file's own bytes cannot: they were decoded strictly.
    if "\\u" in text:
        _refuse_escaped(value, where)
    return value


def _refuse_escaped(value: Any, where: str) -> None:
    """Refuse NUL and lone surrogates that came in through `\\u` escapes."""
    if isinstance(value, str):
        if "\0" in value:
            raise RecordError(f"{where} holds a NUL character; text may not.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                f"{where} holds the lone surrogate {value[error.start]!a}, which is half of a character."
            ) from error
    elif isinstance(value, list):
        for element in value:
            _refuse_escaped(element, where)
    elif isinstance(value, dict):
        for name, element in value.items():
            _refuse_escaped(name, where)
            _refuse_escaped(element, where)


def _parse_object(text: str, where: str) -> Row:
    value = _parse_json(text, where)
    if not isinstance(value, dict):
        raise RecordError(f"{where} is a JSON {type(value).__name__}; a row is an object with named fields.")
    return value


def read_jsonl(path: Path, lines: Lines) -> Iterator[tuple[str, Row]]:
    """Read one object a line; empty lines are skipped."""
    for number, line in lines:
        if line and not line.isspace():
            yield f"{path}:{number}", _parse_object(line, f"{path}:{number}")


def read_json_list(path: Path, lines: Lines, *, records_at: str | None) -> Iterator[tuple[str, Row]]:
    """Read a list of objects, or the one at the dotted path `records_at`, of one JSON document."""
    parts, size = [], 0
    for _, line in lines:
        size += len(line)
        if size > MAX_JSON_BYTES:
            raise RecordError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB; turn it into jsonl, one row a line.")
        parts.append(line)
    value = _parse_json("".join(parts), str(path))
    del parts
    for key in records_at.split(".") if records_at else ():
        if not isinstance(value, dict) or key not in value:
            hint = nearest_names(key, value) if isinstance(value, dict) else f"it is a {type(value).__name__} there"
            raise RecordError(f"{path}: records_at={records_at!r}: no key {key!r}; {hint}.")
        value = value[key]
    if not isinstance(value, list):
        hint = f"declare records_at; {nearest_names('', value)}" if isinstance(value, dict) else "a list is needed"
        raise RecordError(f"{path} holds a {type(value).__name__} where the list of rows should be: {hint}.")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise RecordError(f"{path}: element {number} is a {type(row).__name__}; a row is an object.")
        yield f"{path}: element {number}", row


def read_table(
    path: Path,
    lines: Lines,
    *,
    delimiter: str,
    quoting: Quoting | None,
    columns: Sequence[str] | None,
) -> Iterator[tuple[str, Row]]:
    """Read csv or tsv; without `columns` the first record is the header."""
    if quoting == "csv":
        records = _quoted_records(path, lines, delimiter)
    else:
        records = _plain_records(path, lines, delimiter, refuse_quotes=quoting is None)
    for number, values in records:
        if columns is None:
            columns = values
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise RecordError(f"{path}:{number}: the header names {twice[0]!r} twice; declare columns.")
        elif len(values) != len(columns):
            raise RecordError(
                f"{path}:{number} has {len(values)} columns where {len(columns)} are expected "
                f"({', '.join(columns)}); check delimiter={delimiter!r} and quoting={quoting!r}."
            )
        else:
            yield f"{path}:{number}", dict(zip(columns, values, strict=True))


def _plain_records(path: Path, lines: Lines, delimiter: str, *, refuse_quotes: bool) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            continue
        values = line.split(delimiter)
        if refuse_quotes and '"' in line and any(value.startswith('"') for value in values):
            raise RecordError(
                f"{path}:{number}: a field begins with a double quote; declare quoting: csv (quotes enclose "
                "fields) or none (a quote is a letter)."
            )
        yield number, values


def _quoted_records(path: Path, lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # A setting of the csv module, not of a reader; its default of 128 KiB cuts off ordinary documents.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    start = 1
    try:
        for values in reader:
            if values:
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(
            f"{path}:{start}: the record that starts here cannot be read: {error}; if quotes are plain letters "
            "in this file, declare quoting: none."
        ) from error
