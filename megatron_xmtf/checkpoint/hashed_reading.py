"""Hash a file while its parts are read, so that its bytes come from the disk once.

    file      | header |  rows 0-63  | header |  rows 64-127  |
    asked           |-----1----->|         |------2------>|          read, hashed and handed over
    besides   |---->|            |-------->|              |----->    read for the hash alone

Parts in another order are right as well: what was hashed before is read again, as a rule out of the system's cache.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megatron_xmtf.streamed_io import PIECE_BYTES, OnceReader, SeePiece

__all__ = ["HashedReading"]

LARGE_GAP_BYTES = 8 << 20
"""What is hashed and not asked for stays in the system's cache from this size on: it may be asked for later."""


class HashedReading:
    """A file that is read in parts and hashed from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "rb", buffering=0)
        self._reader = OnceReader(self._stream.fileno())
        self._digest = hashlib.sha256()
        self._hashed = 0

    def read_into(self, buffer: memoryview, offset: int, see: SeePiece | None = None) -> int:
        """Read as `OnceReader.read_into`."""
        if offset < self._hashed:
            return self._reader.read_into(buffer, offset, see)
        self._hash_to(offset)

        def hash_and_see(piece: memoryview) -> None:
            self._digest.update(piece)
            self._hashed += len(piece)
            if see is not None:
                see(piece)

        done = self._reader.read_into(buffer, offset, hash_and_see)
        # A last piece that the file's end cut off.
        self._digest.update(buffer[self._hashed - offset : done])
        self._hashed = offset + done
        return done

    def finish(self) -> str:
        """Hash what is left, close the file, and return the hexadecimal SHA-256 of all of it."""
        self._hash_to(None)
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file, whatever was read of it."""
        self._reader.close()
        self._stream.close()

    def _hash_to(self, end: int | None) -> None:
        """Hash up to a byte of the file, or to its end."""
        left = (os.fstat(self._stream.fileno()).st_size if end is None else end) - self._hashed
        piece = memoryview(bytearray(max(0, min(left, PIECE_BYTES))))
        large = left >= LARGE_GAP_BYTES
        while left > 0:
            wanted = piece[:left]
            if large:
                count = os.preadv(self._stream.fileno(), [wanted], self._hashed)
            else:
                count = self._reader.read_into(wanted, self._hashed)
            if not count:
                return
            self._digest.update(wanted[:count])
            self._hashed, left = self._hashed + count, left - count
