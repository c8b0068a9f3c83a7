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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from megatron_xmtf.errors import ConfigError, RecordError, nearest_names
from megatron_xmtf.files import require_file
from megatron_xmtf.prompts.readers import Quoting, Row, read_json_list, read_jsonl, read_lines, read_table

__all__ = ["Quoting", "Source", "SourceFormat", "read_rows", "source_from_mapping"]

SourceFormat = Literal["jsonl", "json", "csv", "tsv"]


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
    lines = read_lines(source.path, on_bytes)
    if found == "jsonl":
        return read_jsonl(source.path, lines)
    if found == "json":
        return read_json_list(source.path, lines, records_at=source.records_at)
    return read_table(
        source.path,
        lines,
        delimiter=source.delimiter or ("," if found == "csv" else "\t"),
        quoting=source.quoting or ("csv" if found == "csv" else None),
        columns=source.columns,
    )


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
