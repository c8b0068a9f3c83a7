"""What an unfinished run has done so far, so that the same run can go on after it was killed.

An entry is made in this order: all part files brought to the disk, then `journal.json` replaced atomically. Whatever
moment a run is killed at, the journal on the disk speaks of bytes that are there; what lies behind them is cut off.

    key        what the bytes of the output depend on: contents of the inputs, tokenizer, settings, program version
    progress   of the caller: position in the inputs, counts
    parts      part file -> its size and SHA-256 at this moment
    columns    column -> its names so far
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.data.part_file import WrittenFile
from megatron_xmtf.errors import DatasetError, XmtfError
from megatron_xmtf.files import read_json, write_json

__all__ = ["JOURNAL", "Journal", "input_identity", "key_difference"]

JOURNAL = "journal.json"
FORMAT = "megatron_xmtf.journal"
VERSION = 1
ENDS_BYTES = 1 << 16
"""Bytes hashed at each end of an input."""


@dataclass(frozen=True)
class Journal:
    """One entry: the state of a run at one moment."""

    key: dict[str, Any]
    progress: dict[str, Any]
    num_examples: int
    parts: dict[str, WrittenFile]
    columns: dict[str, list[str]]

    def parts_of(self, half: str) -> dict[str, WrittenFile]:
        """Return the part files of an indexed file, by their suffixes."""
        return {name.removeprefix(half): part for name, part in self.parts.items() if name.startswith(half)}

    def write(self, directory: Path) -> None:
        """Replace the journal of `directory`; the part files must be on the disk before."""
        write_json(directory / JOURNAL, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> Journal:
        """Read the journal of `directory`.

        Raises:  DatasetError: damaged, or of another version.
        """
        path = directory / JOURNAL
        try:
            content = read_json(path)
            if content.pop("format") != FORMAT or content.pop("version") != VERSION:
                raise ValueError("another format or version")
            parts = {name: WrittenFile(**state) for name, state in content.pop("parts").items()}
            return cls(**content, parts=parts)
        except (XmtfError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{path}, left by an interrupted run, cannot be gone on from ({error}). Give --restart to begin anew."
            ) from error


def input_identity(path: Path) -> dict[str, Any]:
    """Return what tells whether a file is still the one that was read: size, time of change, hash of both ends."""
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        digest = hashlib.sha256(stream.read(ENDS_BYTES))
        stream.seek(max(status.st_size - ENDS_BYTES, 0))
        digest.update(stream.read(ENDS_BYTES))
    return {
        "path": str(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ends_sha256": digest.hexdigest(),
    }


def key_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what differs between the keys of two runs; "" when nothing does. The paths of inputs may differ."""
    inputs = _inputs_difference(then.get("inputs", []), now.get("inputs", []))
    differences = [inputs] if inputs else []
    for name in sorted((set(then) | set(now)) - {"inputs"}):
        old, new = (_short(key.get(name)) for key in (then, now))
        if then.get(name) != now.get(name):
            differences.append(f"{name.replace('_', ' ')} was {old}, is {new}")
    return "; ".join(differences)


def _inputs_difference(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    if len(then) != len(now):
        return f"{len(then)} input files then, {len(now)} now"
    for old, new in zip(then, now, strict=True):
        for name, what in (("bytes", "size"), ("mtime_ns", "time of change"), ("ends_sha256", "content")):
            if old.get(name) != new.get(name):
                return f"{new['path']} is not the file that was read then as {old.get('path')} (its {what} differs)"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
