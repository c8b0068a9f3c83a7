"""Chunks of rows as they go to the rendering process: ids, variables as JSON, and what the records take over as it is.

row     {"id": "r7", "text": "größe", "split": "train", "a-b": 1}
ids     "r7"
texts   '{"id": "r7", "text": "größe", "split": "train", "a_b": 1}'
fields  {"split": "train"}
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_xmtf.prompts.readers.bad_rows import BadRowError, Reject
from megatron_xmtf.prompts.rendering.prompted_record import RECORD_FIELDS

__all__ = ["RowChunk", "chunk_rows"]

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 4 << 20
"""Rows sent to the worker at once: few enough for its memory, enough to make the pipe's cost vanish."""
MAX_ROW_CHARACTERS = 16 << 20
RESERVED = {"answer_choices": "the template's own", "options_block": "that of the list of options"}


@dataclass
class RowChunk:
    """Some rows, field by field."""

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Each row's variables as a JSON object; `-` in a field's name is `_`."""
    fields: list[dict[str, str]] = field(default_factory=list)
    """Each row's own dataset, config, split, language, task and document, as far as it has them."""

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, row_id: str, row: Mapping[str, Any], text: str) -> None:
        """Add a row, with its variables in words."""
        self.ids.append(row_id)
        self.texts.append(text)
        own = {name: row[name] for name in RECORD_FIELDS if isinstance(row.get(name), str) and row[name]}
        document = row.get("document")
        if isinstance(document, str | int) and not isinstance(document, bool) and document != "":
            own["document"] = str(document)
        self.fields.append(own)


def chunk_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], *, reject: Reject | None = None
) -> Generator[RowChunk, None, None]:
    """Cut a stream of (id, row) into chunks.

    Args:    reject: what is called with a row that cannot be a template's variables. None: it is raised.
    Raises:  BadRowError: such a row, unless `reject` returns.
    """
    chunk = RowChunk()
    characters = 0
    for row_id, row in rows:
        try:
            text = _variables(row, row_id)
        except BadRowError as error:
            if reject is None:
                raise
            reject(error)
            continue
        if len(chunk) == CHUNK_ROWS or (len(chunk) and characters + len(text) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = RowChunk(), 0
        chunk.append(row_id, row, text)
        characters += len(text)
    if len(chunk):
        yield chunk


def _variables(row: Mapping[str, Any], row_id: str) -> str:
    """Word a row as the JSON object of a template's variables; `-` in a field's name becomes `_`."""
    for name, whose in RESERVED.items():
        if name in row:
            raise BadRowError(
                f"a field `{name}`", f"row {row_id} has a field `{name}`, which is {whose}; rename the field."
            )
    renamed = {str(name).replace("-", "_"): value for name, value in row.items()}
    if len(renamed) != len(row):
        raise BadRowError(
            "two fields of one name", f"row {row_id} has two fields whose names differ only in - and _; rename one."
        )
    try:
        text = json.dumps(renamed, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"row {row_id} holds the lone surrogate {text[error.start]!a}, half of a character."
        raise BadRowError("a lone surrogate", what) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError("no JSON value", f"row {row_id} holds what is not a JSON value: {error}.") from error
    if len(text) > MAX_ROW_CHARACTERS:
        what = f"row {row_id} has {len(text):,} characters; a row may have {MAX_ROW_CHARACTERS:,}."
        raise BadRowError("too long", what)
    return text
