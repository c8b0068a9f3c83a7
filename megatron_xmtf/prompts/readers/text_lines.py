"""Read plain text: one row a line, or one row out of line n of several files.

newstest2019-src.eng.txt     newstest2019-ref.swa.txt     DOCUMENT_IDS.tsv
Welsh AMs worried about      AM wa Wales wana wasiwasi    bbc.381790         ->   one row
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject, Row
from megatron_xmtf.prompts.readers.streams import Lines

__all__ = ["decode_line", "read_aligned_lines", "read_text_lines"]


def decode_line(line: bytes, where: str) -> str:
    """Decode one line strictly.

    Raises:  BadRowError: not UTF-8, or a NUL character.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = (
            f"{where} is not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1} of the line; convert the "
            "file (iconv) or remove the line."
        )
        raise BadRowError("not UTF-8", message) from error
    if "\0" in text:
        raise BadRowError("NUL character", f"{where} holds a NUL character; text may not.")
    return text


def read_text_lines(path: Path, lines: Lines, reject: Reject) -> LocatedRows:
    """Read one row {"text": line} a line; empty lines are skipped."""
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            text = _without_newline(decode_line(line, where))
        except BadRowError as error:
            reject(error)
            continue
        if text:
            yield where, {"text": text}


def read_aligned_lines(files: Mapping[str, tuple[Path, Lines]], reject: Reject) -> LocatedRows:
    """Read row n out of line n of every file; an empty line is an empty text, since it holds its place.

    Raises:  RecordError: a file ends before another.
    """
    number = 0
    while True:
        number += 1
        found = {name: next(lines, None) for name, (_, lines) in files.items()}
        if all(line is None for line in found.values()):
            return
        row: Row = {}
        try:
            for name, line in found.items():
                path = files[name][0]
                if line is None:
                    longer = next(files[other][0] for other, text in found.items() if text is not None)
                    raise RecordError(
                        f"{path} ends after line {number - 1}, and {longer} goes on; aligned files have the same "
                        "number of lines."
                    )
                row[name] = _without_newline(decode_line(line[1], f"{path}:{number}"))
        except BadRowError as error:
            reject(error)
            continue
        yield f"{next(iter(files.values()))[0]}:{number}", row


def _without_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
