"""Read rows (plain mappings) out of dataset files, one at a time, as declared and never as guessed.

    format  suffixes               a row is                         what must or may be declared
    jsonl   .jsonl .jsonl.gz       one JSON object a line
    json    .json .json.gz         one element of a list            records_at: "examples" when the list lies inside
    csv     .csv .csv.gz           one record of RFC 4180           columns when there is no header; delimiter
    tsv     .tsv .tsv.gz           one record between tabs          quoting (see below); columns; delimiter

`quoting` of csv and tsv: "csv" means that a field may stand in double quotes and may then hold delimiters and
newlines; "none" means that a quote is a letter like any other. Csv files default to "csv". A tsv file needs no
statement until a field begins with a quote: from there on the two readings differ, and reading stops with an error
that asks which one is meant.

Every value of a csv or tsv row is a string (`answer_choices[label | int]` in a template).

    fields={"id": "index_id"} :  {"index_id": "431", "text": "..."}  ->  {"text": "...", "id": "431"}

Refused with file and line: invalid UTF-8, a lone surrogate, NUL, NaN and Infinity, a key given twice, a line that is
not an object, a record with too many or too few columns, a line over 64 MiB, a damaged gzip stream. A byte-order
mark at the start of a file is dropped; empty lines are skipped.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from megatron_xmtf.errors import ConfigError, RecordError, nearest_names
from megatron_xmtf.files import require_file

__all__ = ["Quoting", "Source", "SourceFormat", "read_rows", "source_from_mapping"]

SourceFormat = Literal["jsonl", "json", "csv", "tsv"]
Quoting = Literal["csv", "none"]
Row = dict[str, Any]

MAX_LINE_BYTES = 64 << 20
"""Longer lines are refused: a file without newlines must not fill the memory."""
MAX_JSON_BYTES = 512 << 20
"""A json list is read whole (a jsonl file is not); larger ones belong in jsonl."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and how to read them; the module docstring has the table."""

    path: Path
    format: SourceFormat | None = None
    """None: by the file's suffix."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """New field name -> the file's name for it; fields not named keep their names."""
    columns: tuple[str, ...] | None = None
    """Column names of a csv or tsv file without a header; None: the first record is the header."""
    delimiter: str | None = None
    """One character; None: a comma for csv, a tab for tsv."""
    quoting: Quoting | None = None
    """Whether double quotes enclose fields."""
    records_at: str | None = None
    """Dotted path to the list inside a json document; None: the document is the list."""

    def resolved_format(self) -> SourceFormat:
        """Return the format, by suffix where none is declared.

        Raises:  ConfigError: unknown suffix or format, or an option that the format does not have.
        """
        name = self.path.name.removesuffix(".gz")
        found = self.format or name.rpartition(".")[2]
        known = get_args(SourceFormat)
        if found not in known:
            what = f"format {found!r}" if self.format else f"the suffix of {self.path.name}"
            raise ConfigError(f"{self.path}: {what} is not one of {', '.join(known)}; declare the format.")
        if found in ("jsonl", "json") and (self.columns or self.delimiter or self.quoting):
            raise ConfigError(
                f"{self.path}: columns, delimiter and quoting are options of csv and tsv, not of {found}."
            )
        if found != "json" and self.records_at:
            raise ConfigError(f"{self.path}: records_at is an option of json, not of {found}.")
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ConfigError(f"{self.path}: delimiter={self.delimiter!r} is not one character.")
        if self.quoting is not None and self.quoting not in get_args(Quoting):
            raise ConfigError(f"{self.path}: quoting={self.quoting!r} is not one of csv, none.")
        return cast(SourceFormat, found)


def source_from_mapping(values: Mapping[str, Any] | str, *, directory: Path, where: str) -> Source:
    """Make a `Source` out of a configuration's value: a path, or a mapping of `Source`'s fields.

    Args:    directory: what a relative path is relative to. where: what to name in an error, as "tasks.yaml: records".
    Raises:  ConfigError: no path, an unknown key, a value of the wrong type.
    """
    if isinstance(values, str):
        values = {"path": values}
    known = [one.name for one in dataclass_fields(Source)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}, {nearest_names(str(key), known)}.")
    options = dict(values)
    if not isinstance(options.get("path"), str):
        raise ConfigError(f"{where}: path={options.get('path')!r} is not a file name.")
    renamed = options.get("fields", {})
    if not isinstance(renamed, Mapping) or not all(isinstance(name, str) for pair in renamed.items() for name in pair):
        raise ConfigError(f"{where}: fields={renamed!r} is not a mapping of new names to the file's names.")
    columns = options.get("columns")
    if columns is not None:
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise ConfigError(f"{where}: columns={columns!r} is not a list of names.")
        options["columns"] = tuple(columns)
    for key in ("format", "delimiter", "quoting", "records_at"):
        if options.get(key) is not None and not isinstance(options[key], str):
            raise ConfigError(f"{where}: {key}={options[key]!r} is not a string.")
    options["path"] = directory / options["path"]
    source = Source(**options)
    source.resolved_format()
    return source


def read_rows(source: Source | Path | str, *, on_bytes: Callable[[int], None] | None = None) -> Iterator[Row]:
    """Read the rows of one file in order, in bounded memory (but for `json`, which is read whole).

    Args:    source: what to read; a path alone is read by its suffix.
             on_bytes: called now and then with the bytes of the file consumed since the last call (a progress bar).
    Raises:  MissingError: no such file. ConfigError: an impossible declaration. RecordError: a row that cannot be
             read, with file, line and reason.
    """
    if not isinstance(source, Source):
        source = Source(Path(source))
    found = source.resolved_format()
    require_file(source.path)
    return _renamed(_read(source, found, on_bytes), source)


def _read(source: Source, found: SourceFormat, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) with where = "file:line" for error messages."""
    lines = _lines(source.path, on_bytes)
    if found == "jsonl":
        for number, line in lines:
            if line and not line.isspace():
                yield f"{source.path}:{number}", _parse_object(line, f"{source.path}:{number}")
    elif found == "json":
        yield from _read_json(source, lines)
    else:
        yield from _read_table(source, found, lines)


def _renamed(rows: Iterable[tuple[str, Row]], source: Source) -> Iterator[Row]:
    for where, row in rows:
        if source.fields:
            # All taken out before any is put back: two fields may swap their names.
            values = {}
            for name, old in source.fields.items():
                if old not in row:
                    raise RecordError(f"{where}: no field {old!r} to read {name!r} from; {nearest_names(old, row)}.")
                values[name] = row[old]
            row = {name: value for name, value in row.items() if name not in source.fields.values()}
            row.update(values)
        yield row


def _lines(path: Path, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
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


def _read_json(source: Source, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Row]]:
    parts, size = [], 0
    for _, line in lines:
        size += len(line)
        if size > MAX_JSON_BYTES:
            raise RecordError(f"{source.path} is over {MAX_JSON_BYTES >> 20} MiB; turn it into jsonl, one row a line.")
        parts.append(line)
    value = _parse_json("".join(parts), str(source.path))
    del parts
    for key in source.records_at.split(".") if source.records_at else ():
        if not isinstance(value, dict) or key not in value:
            hint = nearest_names(key, value) if isinstance(value, dict) else f"it is a {type(value).__name__} there"
            raise RecordError(f"{source.path}: records_at={source.records_at!r}: no key {key!r}; {hint}.")
        value = value[key]
    if not isinstance(value, list):
        hint = f"declare records_at; {nearest_names('', value)}" if isinstance(value, dict) else "a list is needed"
        raise RecordError(f"{source.path} holds a {type(value).__name__} where the list of rows should be: {hint}.")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise RecordError(f"{source.path}: element {number} is a {type(row).__name__}; a row is an object.")
        yield f"{source.path}: element {number}", row


def _read_table(source: Source, found: SourceFormat, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Row]]:
    delimiter = source.delimiter or ("," if found == "csv" else "\t")
    quoting = source.quoting or ("csv" if found == "csv" else None)
    records = (
        _quoted_records(source, delimiter, lines)
        if quoting == "csv"
        else _plain_records(source, delimiter, lines, refuse_quotes=quoting is None)
    )
    columns: Sequence[str] | None = source.columns
    for number, values in records:
        if columns is None:
            columns = values
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise RecordError(f"{source.path}:{number}: the header names {twice[0]!r} twice; declare columns.")
        elif len(values) != len(columns):
            raise RecordError(
                f"{source.path}:{number} has {len(values)} columns where {len(columns)} are expected "
                f"({', '.join(columns)}); check delimiter={delimiter!r} and quoting={quoting!r}."
            )
        else:
            yield f"{source.path}:{number}", dict(zip(columns, values, strict=True))


def _plain_records(
    source: Source, delimiter: str, lines: Iterable[tuple[int, str]], *, refuse_quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            continue
        values = line.split(delimiter)
        if refuse_quotes and '"' in line and any(value.startswith('"') for value in values):
            raise RecordError(
                f"{source.path}:{number}: a field begins with a double quote; declare quoting: csv (quotes enclose "
                "fields) or none (a quote is a letter)."
            )
        yield number, values


def _quoted_records(
    source: Source, delimiter: str, lines: Iterable[tuple[int, str]]
) -> Iterator[tuple[int, list[str]]]:
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
            f"{source.path}:{start}: the record that starts here cannot be read: {error}; if quotes are plain letters "
            "in this file, declare quoting: none."
        ) from error
