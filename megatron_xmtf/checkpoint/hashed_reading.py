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

from megatron_xmtf.streamed_io import KEPT_BYTES, OnceReader

__all__ = ["HashedReading"]

PIECE_BYTES = 4 << 20
"""What is read and hashed at a time: still in a core's cache when it is hashed, which then is twice as fast."""


class HashedReading:
    """A file that is read in parts and hashed from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "rb", buffering=0)
        self._reader = OnceReader(self._stream.fileno())
        self._digest = hashlib.sha256()
        self._hashed = 0

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer of bytes from a place of the file; return the bytes read, fewer only at the file's end."""
        if offset < self._hashed:
            return self._reader.read_into(buffer, offset)
        self._hash_to(offset)
        done = 0
        while done < len(buffer):
            # Up to places that the reader asks the system for, whose bytes then come straight into the buffer.
            piece = buffer[done : done + PIECE_BYTES - (offset + done) % PIECE_BYTES]
            count = self._reader.read_into(piece, offset + done)
            self._digest.update(piece[:count])
            self._hashed, done = self._hashed + count, done + count
            if count < len(piece):
                break
        return done

    def finish(self) -> str:
        """Hash what is left, close the file, and return the hexadecimal SHA-256 of all of it."""
        self._hash_to(None)
        self._stream.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file, whatever was read of it."""
        self._stream.close()

    def _hash_to(self, end: int | None) -> None:
        """Hash up to a byte of the file, or to its end; many bytes stay in the cache, they may be asked for later."""
        left = (os.fstat(self._stream.fileno()).st_size if end is None else end) - self._hashed
        piece = memoryview(bytearray(max(0, min(left, PIECE_BYTES))))
        while left > 0:
            wanted = piece[:left]
            if left < KEPT_BYTES:
                count = self._reader.read_into(wanted, self._hashed)
            else:
                count = os.preadv(self._stream.fileno(), [wanted], self._hashed)
            if not count:
                return
            self._digest.update(wanted[:count])
            self._hashed, left = self._hashed + count, left - count
