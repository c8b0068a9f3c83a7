"""A file of records that comes into being whole: lines in, cut to a cap at the end, renamed when it is on the disk.

Lines are gathered and appended a mebibyte at a time, and the file is closed in between, so that hundreds of files can
grow at once. The temporary name is always the same: what a killed run has left is overwritten by the next.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from megatron_xmtf.files import TEMPORARY_MARK, disk_errors, fsync_directory

__all__ = ["FinishedFile", "OutputFile"]

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class FinishedFile:
    """What a file holds."""

    records: int
    bytes: int
    sha256: str


class OutputFile:
    """Records of one template; `finish` or `discard` ends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}lines")
        self._buffer = bytearray()
        self._keys = array("Q")
        self._begun = False

    def append(self, line: bytes, key: int = 0) -> None:
        """Add a line with its newline. Args: key: what a cap judges it by."""
        self._buffer += line
        self._keys.append(key)
        if len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def finish(self, *, cap: int | None = None, threshold: int = 0) -> FinishedFile | None:
        """Make the file, or none when there is no record.

        Args:    cap, threshold: keep the records with keys below the threshold, and of those at it the first ones,
                 `cap` in all. None: keep all.
        """
        self._flush()
        if not len(self._keys):
            return None
        with disk_errors(self.path):
            kept = self._temporary if cap is None else self._cut(cap, threshold)
            digest, size, records = hashlib.sha256(), 0, 0
            with open(kept, "rb") as stream:
                for line in stream:
                    digest.update(line)
                    size += len(line)
                    records += 1
                os.fsync(stream.fileno())
            os.replace(kept, self.path)
            fsync_directory(self.path.parent)
        self.discard()
        return FinishedFile(records, size, digest.hexdigest())

    def discard(self) -> None:
        """Remove what is not finished."""
        self._buffer.clear()
        self._temporary.unlink(missing_ok=True)
        self._cut_name.unlink(missing_ok=True)

    @property
    def _cut_name(self) -> Path:
        return self.path.with_name(f"{self.path.name}{TEMPORARY_MARK}cut")

    def _flush(self) -> None:
        if not self._buffer:
            return
        with disk_errors(self.path):
            if not self._begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._temporary, "ab" if self._begun else "wb") as stream:
                stream.write(self._buffer)
        self._begun = True
        self._buffer.clear()

    def _cut(self, cap: int, threshold: int) -> Path:
        at_threshold = cap - sum(key < threshold for key in self._keys)
        with open(self._temporary, "rb") as stream, open(self._cut_name, "wb") as cut:
            for key, line in zip(self._keys, stream, strict=True):
                if key == threshold:
                    at_threshold -= 1
                if key < threshold or (key == threshold and at_threshold >= 0):
                    cut.write(line)
        return self._cut_name
