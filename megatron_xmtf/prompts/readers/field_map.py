"""Give the fields of a row the names that a template uses: renamed, taken out of what is nested, or constant.

row      {"id": "7", "question": {"stem": "2 + 2?", "choices": [{"text": "3"}, {"text": "4"}]}, "key": "B"}
fields   {"answer": "key", "question": "question.stem", "choices": "question.choices.*.text"}
gives    {"id": "7", "question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}

A field that is read whole loses its old name; one that a path leads into stays, unless its name is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, Row

__all__ = ["mapped_row", "value_at"]


def mapped_row(row: Row, where: str, *, fields: Mapping[str, str], constants: Mapping[str, Any]) -> Row:
    """Return the row under its new names, with the constants.

    Raises:  BadRowError: no field to read from. ConfigError: the row has a field of a constant's name.
    """
    if fields:
        # All taken out before any is put back: two fields may swap their names.
        values = {name: value_at(row, path, name, where) for name, path in fields.items()}
        whole = {path for path in fields.values() if path in row}
        row = {name: value for name, value in row.items() if name not in whole}
        row.update(values)
    if constants:
        for name in constants:
            if name in row:
                raise ConfigError(
                    f"{where} has a field {name!r} of its own ({str(row[name])[:40]!r}), and constants gives "
                    f"{constants[name]!r}; drop the constant, or rename the field (fields: {{file_{name}: {name}}})."
                )
        row = {**row, **constants}
    return row


def value_at(row: Row, path: str, name: str, where: str) -> Any:
    """Read a field by its name as it stands, else by a dotted path.

    Args:    name, where: what the value is for, and file and line, for the error.
    Raises:  BadRowError: there is no such field.
    """
    if path in row:
        return row[path]
    return _descend(row, path.split("."), path, name, where)


def _descend(value: Any, keys: list[str], path: str, name: str, where: str) -> Any:
    for position, key in enumerate(keys):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key == "*":
            return [_descend(element, keys[position + 1 :], path, name, where) for element in value]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            known = list(value) if isinstance(value, dict) else []
            hint = nearest_names(key, known) if known else f"a {type(value).__name__} is there: {str(value)[:40]!r}"
            step = "" if key == path else f" (at {key!r})"
            raise BadRowError(f"no field {path!r}", f"{where}: no field {path!r}{step} to read {name!r} from; {hint}.")
    return value
