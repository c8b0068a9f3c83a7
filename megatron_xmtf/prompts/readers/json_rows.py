"""Read JSON: one object a line, or a list of objects in one document.

Strict: NaN and Infinity, a key given twice, NUL, a lone surrogate and what is nested too deeply are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import RecordError, nearest_names
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject, Row
from megatron_xmtf.prompts.readers.streams import Lines
from megatron_xmtf.prompts.readers.text_lines import decode_line

__all__ = ["parse_json", "read_json_document", "read_json_list", "read_jsonl"]

MAX_JSON_BYTES = 512 << 20
"""A json document is read whole (a jsonl file is not); larger ones belong in jsonl."""


def read_jsonl(path: Path, lines: Lines, reject: Reject) -> LocatedRows:
    """Read one object a line; empty lines are skipped."""
    for number, line in lines:
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = _parse_object(decode_line(line, where), where)
        except BadRowError as error:
            reject(error)
            continue
        yield where, row


def read_json_list(
    path: Path, lines: Lines, reject: Reject, *, records_at: str | None, keys_as: str | None
) -> LocatedRows:
    """Read a list of objects, or the values of an object of objects, at the dotted path `records_at`.

    keys_as="number":   {"1": {"q": "a"}, "2": {"q": "b"}}   ->   {"number": "1", "q": "a"}, {"number": "2", "q": "b"}
    """
    value = read_json_document(path, lines)
    for key in records_at.split(".") if records_at else ():
        if not isinstance(value, dict) or key not in value:
            hint = nearest_names(key, value) if isinstance(value, dict) else f"it is a {type(value).__name__} there"
            raise RecordError(f"{path}: records_at={records_at!r}: no key {key!r}; {hint}.")
        value = value[key]
    if keys_as is not None:
        value = _keyed_rows(path, value, keys_as)
    if not isinstance(value, list):
        hint = f"declare records_at; {nearest_names('', value)}" if isinstance(value, dict) else "a list is needed"
        raise RecordError(f"{path} holds a {type(value).__name__} where the list of rows should be: {hint}.")
    for number, row in enumerate(value):
        where = f"{path}: element {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            reject(BadRowError("not an object", f"{where} is a {type(row).__name__}; a row is an object."))


def _keyed_rows(path: Path, value: Any, keys_as: str) -> list[Any]:
    if not isinstance(value, dict):
        raise RecordError(f"{path}: keys_as={keys_as!r} needs an object of rows; there is a {type(value).__name__}.")
    for key, row in value.items():
        if isinstance(row, dict) and keys_as in row:
            raise RecordError(f"{path}: keys_as={keys_as!r}: the row {key!r} has a field of that name already.")
    return [{keys_as: key, **row} if isinstance(row, dict) else row for key, row in value.items()]


def read_json_document(path: Path, lines: Lines) -> Any:
    """Read one JSON document whole.

    Raises:  RecordError: over 512 MiB, not UTF-8, not JSON.
    """
    parts, size = [], 0
    for number, line in lines:
        size += len(line)
        if size > MAX_JSON_BYTES:
            raise RecordError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB; turn it into jsonl, one row a line.")
        parts.append(decode_line(line, f"{path}:{number}"))
    return parse_json("".join(parts), str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse one JSON value strictly.

    Raises:  BadRowError: not JSON, or what the module's docstring refuses.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        message = f"{where} is not valid JSON: {error.msg} at {line}column {error.colno}."
        raise BadRowError("not valid JSON", message) from error
    except ValueError as error:
        raise BadRowError("not valid JSON", f"{where} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise BadRowError("nested too deeply", f"{where} is nested too deeply to be read.") from error
    # Only an escape can bring what the file's own bytes cannot: they were decoded strictly.
    if "\\u" in text:
        _refuse_escaped(value, where)
    return value


def _parse_object(text: str, where: str) -> Row:
    value = parse_json(text, where)
    if not isinstance(value, dict):
        message = f"{where} is a JSON {type(value).__name__}; a row is an object with named fields."
        raise BadRowError("not an object", message)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return row


# Made once: json.loads would make one for every line, which takes longer than to parse the line.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_of_pairs)


def _refuse_escaped(value: Any, where: str) -> None:
    """Refuse NUL and lone surrogates that came in through `\\u` escapes."""
    if isinstance(value, str):
        if "\0" in value:
            raise BadRowError("NUL character", f"{where} holds a NUL character; text may not.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"{where} holds the lone surrogate {value[error.start]!a}, which is half of a character."
            raise BadRowError("lone surrogate", message) from error
    elif isinstance(value, list):
        for element in value:
            _refuse_escaped(element, where)
    elif isinstance(value, dict):
        for name, element in value.items():
            _refuse_escaped(name, where)
            _refuse_escaped(element, where)
