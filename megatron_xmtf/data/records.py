"""Read records out of JSON Lines: turn a line into strings.

A record format names the fields that are read; it is chosen, never guessed:

    format             fields (others are ignored)    inputs                                      targets
    records            inputs, targets                inputs                                      targets
    prompt_completion  prompt, completion             prompt                                      completion
    instruction        instruction, input?, output    instruction, blank line, input              output
    messages           messages [{role, content}]     contents of all but the last, blank lines   content of the last
                                                      between them                                (an assistant's)

and of every format, optionally, the strings dataset, language, template, task, config, split, template_language,
document, and id (a string or a whole number). Kind "text" reads the field text.

Records of one source row have one document number, whatever their template or language, so that a split by document
never tears them apart. It is the first 8 bytes, little-endian, of the SHA-256 of the first of these that is given:

    document   "\\0doc\\0" + document     the same in every dataset: parallel rows in several languages
    id         dataset + "\\0" + id       the rows of one dataset
    neither    inputs, or text
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from megatron_xmtf.data.dataset_manifest import COLUMNS, Kind
from megatron_xmtf.errors import ConfigError, nearest_names

__all__ = ["FIELDS", "BadRecord", "InputPosition", "LineChunk", "Record", "RecordFormat", "RecordParser"]

RecordFormat = Literal["records", "prompt_completion", "instruction", "messages"]
FIELDS: dict[RecordFormat, tuple[str, ...]] = {
    "records": ("inputs", "targets"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages",),
}
"""Fields that each record format reads, for kind "pairs"."""
COLUMNS_LIMIT = 1 << 14
"""Combinations of columns that are remembered."""
COLON = b'":'
LATE_COLON = re.compile(rb'"[ \t\r]+:')
"""Behind a key, and rarely in a text."""


class BadRecord(Exception):
    """A line that is no record; `reason` is a word for counting, `detail` a phrase without the line's content."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class InputPosition:
    """The start of a line somewhere in the input files: where reading goes on."""

    file: int = 0
    """Number of the file, from 0."""
    offset: int = 0
    """Bytes of the file before the line, decompressed."""
    line: int = 1
    """Number of the line in its file, from 1."""
    bytes_read: int = 0
    """Bytes read so far as they lie on the disk (compressed for .gz and .zst), earlier files included."""


@dataclass(frozen=True)
class LineChunk:
    """Some whole lines of a file."""

    path: str
    first_line: int
    """Number of the first of them in the file, counting from 1."""
    data: bytes
    position: InputPosition
    """Of the line after them."""


class Record(NamedTuple):
    """The strings of one record; for kind "text" the text is `targets` and `inputs` is empty."""

    inputs: str
    targets: str
    columns: tuple[str, ...]
    """Values of `COLUMNS`; "" where the record does not say."""
    document: int
    """Number of the document that the record was made of, below 2^64."""


def document_number(content: str, *, document: str, dataset: str, identity: str) -> int:
    """Return the number of a record's document; "" is a field that the record does not have."""
    name = f"\0doc\0{document}" if document else f"{dataset}\0{identity}" if identity else content
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")


class RecordParser:
    """Turn lines into records of one kind and format."""

    def __init__(self, *, kind: Kind, record_format: RecordFormat, field_map: Mapping[str, str]) -> None:
        """Args: field_map: field of the format, or column -> its name in the files.

        Raises:  ConfigError: a field that the format does not read, or a format that has no text.
        """
        if kind == "text" and record_format != "records":
            raise ConfigError(f"kind text reads the field text; format {record_format} is for pairs only.")
        fields = ("text",) if kind == "text" else FIELDS[record_format]
        optional = (*COLUMNS, "document", "id")
        unknown = [name for name in field_map if name not in (*fields, *optional)]
        if unknown:
            raise ConfigError(
                f"field map names {unknown[0]!r}, which {kind} of format {record_format} does not read; "
                + nearest_names(unknown[0], [*fields, *optional])
            )
        self._columns: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._names = {name: field_map.get(name, name) for name in (*fields, *optional)}
        self._column_names = [self._names[name] for name in COLUMNS]
        readers: dict[RecordFormat, Callable[[dict[str, Any]], tuple[str, str]]] = {
            "records": lambda row: (self._text(row, "inputs"), self._text(row, "targets")),
            "prompt_completion": lambda row: (self._text(row, "prompt"), self._text(row, "completion")),
            "instruction": self._read_instruction,
            "messages": self._read_messages,
        }
        self._read = (lambda row: ("", self._text(row, "text"))) if kind == "text" else readers[record_format]

    def parse(self, line: bytes) -> Record:
        """Read one line.

        Raises:  BadRecord: not UTF-8, not JSON, not an object, a key twice, a field missing or no string, or a
                 string that is not Unicode text.
        """
        row = _read_quickly(line)
        strictly = row is None or type(row.get(self._names["id"])) is float  # an id of more than 64 bits, to orjson
        if row is None or strictly:
            row = _read_object(line)
        inputs, targets = self._read(row)
        columns = self._read_columns(row)
        document, identity = self._optional(row, "document"), self._identity(row)
        if strictly and b"\\u" in line:  # only an escape can smuggle a surrogate past the UTF-8 decoder
            for text in (inputs, targets, *columns, document, identity):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise BadRecord("lone_surrogate", "a string holds half of a surrogate pair (\\ud800 ...)") from None
        content = inputs or targets  # of kind "text" the inputs are empty
        number = document_number(content, document=document, dataset=columns[0], identity=identity)
        return Record(inputs, targets, columns, number)

    def _text(self, row: dict[str, Any], name: str) -> str:
        field = self._names[name]
        if field not in row:
            has = ", ".join(key[:32] for key in list(row)[:8]) or "none"
            detail = f"there is no field {field!r}, its fields are: {has} (say which one it is: --field-map {name}=...)"
            raise BadRecord("missing_field", detail)
        value = row[field]
        if not isinstance(value, str):
            raise BadRecord("not_a_string", f"field {field!r} is {_json_type(value)}, not a string")
        return value

    def _optional(self, row: dict[str, Any], name: str) -> str:
        return "" if row.get(self._names[name]) is None else self._text(row, name)

    def _read_columns(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Return the columns; the same few combinations come again and again."""
        values = tuple(map(row.get, self._column_names))
        try:
            columns = self._columns.get(values)
        except TypeError:  # a list or an object, which cannot be looked up
            columns = None
        if columns is None:
            columns = tuple(self._optional(row, name) for name in COLUMNS)
            if len(self._columns) >= COLUMNS_LIMIT:
                self._columns.clear()
            self._columns[values] = columns
        return columns

    def _identity(self, row: dict[str, Any]) -> str:
        value = row.get(self._names["id"])
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._optional(row, "id")

    def _read_instruction(self, row: dict[str, Any]) -> tuple[str, str]:
        parts = [self._text(row, "instruction"), self._optional(row, "input")]
        return "\n\n".join(part for part in parts if part.strip()), self._text(row, "output")

    def _read_messages(self, row: dict[str, Any]) -> tuple[str, str]:
        field = self._names["messages"]
        if field not in row:
            self._text(row, "messages")  # raises: names the fields that there are
        messages = row[field]
        if not isinstance(messages, list) or len(messages) < 2:
            raise BadRecord("bad_messages", f"field {field!r} is not a list of two messages or more")
        contents = []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise BadRecord("bad_messages", f"message {number} has no role and content that are strings")
            contents.append(message["content"])
        if messages[-1]["role"] != "assistant":
            raise BadRecord("bad_messages", "the last message is not the assistant's, so there is no target")
        return "\n\n".join(contents[:-1]), contents[-1]


def _read_quickly(line: bytes) -> dict[str, Any] | None:
    """Read a line with orjson, which keeps the last of two equal keys; None: `_read_object` must look at it.

    Every key is followed by a colon, and in a text a quote before a colon is an escaped one: there are at most as many
    keys as `":`. When there are as many as different keys, no key was there twice:

        {"inputs": "a: b", "id": "7"}             2 of `":`, 2 keys
        {"id": "6", "inputs": "a", "id": "7"}     3 of `":`, 2 keys: read again
        {"inputs": "say \\"a\\": b"}              2 of `":`, 1 key: read again, and accepted
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(row) is not dict:
        return None
    colons = line.count(COLON)
    if b" :" in line or b"\t" in line or b"\r" in line:
        colons += len(LATE_COLON.findall(line))
    return row if colons == len(row) or colons == _count_keys(row) else None


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_count_keys, value.values()))
    return sum(map(_count_keys, value)) if isinstance(value, list) else 0


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRecord("invalid_json", f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRecord("invalid_json", "nested too deeply") from None
    except ValueError:  # a number of more than 4300 digits
        raise BadRecord("invalid_json", "a number is too long") from None
    if not isinstance(row, dict):
        raise BadRecord("not_an_object", f"it is {_json_type(row)}, not an object")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise BadRecord("duplicate_key", "a key appears twice; which value is meant?")
    return row


def _refuse_constant(name: str) -> Any:
    raise BadRecord("invalid_json", f"{name} is not JSON")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
