"""Declare where rows come from; nothing about a file is guessed.

    format                suffixes          a row is                              what must or may be declared
    jsonl                 .jsonl            one JSON object a line
    json                  .json             one element of a list                 records_at, keys_as
    csv                   .csv              one record of RFC 4180                columns, delimiter, quoting
    tsv                   .tsv              one record between tabs               columns, delimiter, quoting
    lines                 (declared)        {"text": one line}                    or `aligned` instead of `path`
    parquet               .parquet          one row of the table                  columns: those that are read
    squad                 (declared)        one question of a SQuAD document
    tydiqa                (declared)        one question of TyDi QA's full jsonl
    natural_instructions  (declared)        one instance of a task file
    huggingface           (declared)        one row of a dataset                  path or hub; name, split, revision

Each suffix but .parquet may be followed by .gz or .zst, or by .tar, .tar.gz or .tar.zst: such an archive holds one
file, or `member` names the one that is read; nothing is written to the disk. A list of paths is read in its order.
Patterns (`*.jsonl`) are file names like any other: nothing is expanded.

Fields of a row keep their names but for what `fields` says, and `constants` are added to each row:

    row        {"id": "7", "question": {"stem": "2 + 2?", "choices": [{"text": "3"}, {"text": "4"}]}, "key": "B"}
    fields     answer: key                              a field under a new name
               question: question.stem                  a dotted path into what is nested; 0, 1, ... into a list
               choices: question.choices.*.text         * for every element of a list
    constants  language: en
    gives      {"id": "7", "question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "language": "en"}

`where` leaves out rows of other values than those named, by the file's names: `where: {info.language: [Polish]}`.

docs/sources.md has one worked declaration for each format, and what each refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_xmtf.errors import ConfigError, nearest_names

__all__ = ["Quoting", "Source", "SourceFormat", "file_suffixes", "source_from_mapping"]

SourceFormat = Literal[
    "jsonl", "json", "csv", "tsv", "lines", "parquet", "squad", "tydiqa", "natural_instructions", "huggingface"
]
Quoting = Literal["csv", "none"]
BY_SUFFIX: tuple[SourceFormat, ...] = ("jsonl", "json", "csv", "tsv", "parquet")
OPTIONS: dict[str, tuple[SourceFormat, ...]] = {
    "columns": ("csv", "tsv", "parquet", "huggingface"),
    "delimiter": ("csv", "tsv"),
    "quoting": ("csv", "tsv"),
    "records_at": ("json",),
    "keys_as": ("json",),
    "aligned": ("lines",),
    "hub": ("huggingface",),
    "name": ("huggingface",),
    "split": ("huggingface",),
    "revision": ("huggingface",),
}
"""Which formats have which option."""
TEXTS = ("format", "delimiter", "quoting", "records_at", "keys_as", "member", "hub", "name", "split", "revision")
"""Options that are texts."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and how to read them; the module docstring has the table."""

    path: Path | tuple[Path, ...] | None = None
    """A file, or several that are read one after the other; for huggingface a directory. None: see aligned and hub."""
    format: SourceFormat | None = None
    """None: by the file's suffix."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """New field name -> the file's name for it, or a dotted path; fields not named keep their names."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields that every row is given, such as language, dataset, config and split."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The file's name of a field, or a dotted path -> the values that a row must have one of (`row_filter.py`)."""
    columns: tuple[str, ...] | None = None
    """csv, tsv: names of the columns of a file without a header. parquet, huggingface: the columns that are read."""
    delimiter: str | None = None
    """One character; None: a comma for csv, a tab for tsv."""
    quoting: Quoting | None = None
    """Whether double quotes enclose fields; None: yes for csv, and for tsv an error where it would matter."""
    records_at: str | None = None
    """Dotted path to the list inside a json document; None: the document is the list."""
    keys_as: str | None = None
    """The rows are the values of a json object, not of a list; its keys become the field of this name."""
    member: str | None = None
    """Name of the file inside a .tar archive; None: the only one."""
    aligned: Mapping[str, Path] = field(default_factory=dict)
    """Field name -> text file: line n of every file makes row n."""
    hub: str | None = None
    """Dataset id on the Hugging Face hub, as `owner/name`, instead of a path."""
    name: str | None = None
    """Configuration of a Hugging Face dataset (`config_name`)."""
    split: str | None = None
    """Split of a Hugging Face dataset; None: the only one."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every path that is read, in order; empty for a dataset on the hub."""
        if self.aligned:
            return tuple(self.aligned.values())
        if self.path is None:
            return ()
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def label(self) -> str:
        """What to call the source in a message: its first path and how many more there are, or the hub id."""
        if self.hub is not None:
            return self.hub
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}" if self.paths else "a source without a path"

    def resolved_format(self) -> SourceFormat:
        """Return the format, by suffix where none is declared.

        Raises:  ConfigError: no path or too many origins, files of different formats, an unknown suffix or format,
                 an option that the format does not have, a value that the option cannot have.
        """
        origins = [name for name in ("path", "aligned", "hub") if getattr(self, name)]
        if len(origins) != 1:
            found_origins = " and ".join(origins) or "nothing"
            raise ConfigError(f"a source has one of path, aligned and hub; this one has {found_origins}.")
        found = self._format()
        for option, formats in OPTIONS.items():
            if getattr(self, option) and found not in formats:
                raise ConfigError(f"{self.label}: {option} is an option of {', '.join(formats)}, not of {found}.")
        if self.member and not all("tar" in file_suffixes(path) for path in self.paths):
            raise ConfigError(f"{self.label}: member names a file of a .tar archive; this is none.")
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ConfigError(f"{self.label}: delimiter={self.delimiter!r} is not one character.")
        if self.quoting is not None and self.quoting not in get_args(Quoting):
            raise ConfigError(f"{self.label}: quoting={self.quoting!r} is not one of csv, none.")
        if found == "huggingface" and len(self.paths) > 1:
            raise ConfigError(f"{self.label}: a Hugging Face dataset is one directory; declare one source each.")
        if self.revision and not self.hub:
            raise ConfigError(f"{self.label}: revision={self.revision!r} is for datasets on the hub alone.")
        twice = set(self.constants) & set(self.fields)
        if twice:
            raise ConfigError(f"{self.label}: {sorted(twice)[0]!r} is named by both fields and constants.")
        return found

    def _format(self) -> SourceFormat:
        known = get_args(SourceFormat)
        if self.format is not None:
            if self.format not in known:
                raise ConfigError(f"{self.label}: format {self.format!r} is not one of {', '.join(known)}.")
            return self.format
        if self.hub:
            return "huggingface"
        if self.aligned:
            return "lines"
        found: list[SourceFormat] = []
        for path in self.paths:
            suffix = next(iter(file_suffixes(path)), "")
            by_suffix = [name for name in BY_SUFFIX if name == suffix]
            if not by_suffix:
                raise ConfigError(
                    f"{path}: the suffix of {path.name} is not one of {', '.join(BY_SUFFIX)}; declare the format: one "
                    f"of {', '.join(known)}."
                )
            found += by_suffix
        if len(set(found)) > 1:
            raise ConfigError(
                f"{self.label}: files of different formats ({', '.join(sorted(set(found)))}); declare it."
            )
        return found[0]


def file_suffixes(path: Path) -> list[str]:
    """Return the suffixes that say how to open a file, without dots: at most one format, `tar`, one compression.

    >>> file_suffixes(Path("exams.v2.jsonl.tar.gz"))
    ['jsonl', 'tar', 'gz']
    """
    found: list[str] = []
    parts = path.name.split(".")[1:]
    for accepted in (("gz", "zst"), ("tar",)):
        if parts and parts[-1] in accepted:
            found.insert(0, parts.pop())
    return parts[-1:] + found


def source_from_mapping(values: Mapping[str, Any] | str, *, directory: Path, where: str) -> Source:
    """Make a `Source` out of a configuration's value: a path, or a mapping of `Source`'s fields.

    Args:    directory: what a relative path is relative to. where: what to name in an error, as "tasks.yaml: records".
    Raises:  ConfigError: no path, an unknown key, a value of the wrong type, whatever `resolved_format` refuses.
    """
    if isinstance(values, str):
        values = {"path": values}
    known = [one.name for one in dataclass_fields(Source)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}, {nearest_names(str(key), known)}.")
    options = {key: value for key, value in values.items() if value is not None}
    if "path" in options or not ("aligned" in options or "hub" in options):
        options["path"] = _paths(options.get("path"), directory, where)
    if "columns" in options:
        options["columns"] = tuple(_names(options["columns"], "columns", where))
    for key in ("fields", "aligned"):
        options[key] = _mapping_of_texts(options.get(key, {}), key, where)
    options["aligned"] = {name: directory / path for name, path in options["aligned"].items()}
    constants = options.get("constants", {})
    if not isinstance(constants, Mapping) or not all(isinstance(name, str) for name in constants):
        raise ConfigError(f"{where}: constants={constants!r} is not a mapping of field names to values.")
    options["where"] = _wanted_values(options.get("where", {}), where)
    for key in TEXTS:
        if key in options and not (isinstance(options[key], str) and options[key]):
            raise ConfigError(f"{where}: {key}={options[key]!r} is not a text.")
    source = Source(**options)
    source.resolved_format()
    return source


def _paths(value: Any, directory: Path, where: str) -> Path | tuple[Path, ...]:
    if isinstance(value, str) and value:
        return directory / value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"{where}: path={value!r} is not a file name, nor a list of them.")
    return tuple(directory / name for name in value)


def _names(value: Any, key: str, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{where}: {key}={value!r} is not a list of names.")
    return value


def _wanted_values(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not all(isinstance(path, str) and path for path in value):
        raise ConfigError(f"{where}: where={value!r} is not a mapping of field names to values.")
    wanted = {}
    for path, given in value.items():
        listed = given if isinstance(given, list) else [given]
        if not listed or not all(isinstance(one, str | int) and not isinstance(one, bool) for one in listed):
            raise ConfigError(
                f"{where}: where: {path}: {given!r} is not a text or a whole number, nor a list of them; in YAML put "
                "no, yes, true, false and the like into quotes."
            )
        if "*" in path.split("."):
            raise ConfigError(f"{where}: where: {path!r} leads to many values; name one of them by its number.")
        wanted[path] = tuple(str(one) for one in listed)
    return wanted


def _mapping_of_texts(value: Any, key: str, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        what = "new names to the file's names" if key == "fields" else "field names to files"
        raise ConfigError(f"{where}: {key}={value!r} is not a mapping of {what}.")
    return dict(value)
