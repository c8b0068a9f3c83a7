"""A file that grows while its size and hash can be recorded, and that goes on from such a record."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_xmtf.errors import DatasetError

__all__ = ["PartFile", "WrittenFile"]

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """Size and content hash of a file."""

    bytes: int
    """Length of the file."""
    sha256: str
    """Hexadecimal SHA-256, computed while writing."""


class PartFile:
    """An append-only file of an output that is not finished.

    part = PartFile(path)                     # an empty file
    part.write(b"abc")
    state = part.sync()                       # on the disk, even if the power fails; WrittenFile(3, "ba7816bf...")
    part.write(b"de")                         # ... killed here
    part = PartFile(path, written=state)      # "abc" again: checked against the hash, "de" cut off

    Not buffered: callers write megabytes at a time, and closing after a full disk has nothing left to fail on.
    """

    def __init__(self, path: Path, *, written: WrittenFile | None = None) -> None:
        """Args: written: the state to go on from; reading it again takes about a second per GB.

        Raises:  DatasetError: the file does not begin with what `written` says.
        """
        self.path = path
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self._stream = open(path, "wb" if written is None else "r+b", buffering=0)  # noqa: SIM115 - closed by close
        if written is not None:
            try:
                self._take_up(written)
            except BaseException:
                self._stream.close()
                raise

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data)
        while left:
            left = left[self._stream.write(left) :]
        self._digest.update(data)
        self.num_bytes += len(data)

    def sync(self) -> WrittenFile:
        """Bring everything to the disk; return the state."""
        os.fsync(self._stream.fileno())
        return WrittenFile(self.num_bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file; it stays."""
        self._stream.close()

    def _take_up(self, written: WrittenFile) -> None:
        while self.num_bytes < written.bytes:
            block = self._stream.read(min(HASH_BLOCK_BYTES, written.bytes - self.num_bytes))
            if not block:
                break
            self._digest.update(block)
            self.num_bytes += len(block)
        if self.num_bytes < written.bytes or self._digest.hexdigest() != written.sha256:
            raise DatasetError(
                f"{self.path} does not hold the {written.bytes} bytes that the interrupted run recorded: it was cut "
                "off or altered. Give --restart to begin anew."
            )
        self._stream.truncate(written.bytes)
        self._stream.seek(written.bytes)
