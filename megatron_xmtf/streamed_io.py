"""Read and write large files once, without filling the system's cache with them.

    reading    small pieces out of what the system reads ahead; behind them it is told to let go (posix_fadvise)
    writing    RWF_DONTCACHE, Linux from 6.14: pages go to the disk at once and leave; elsewhere posix_fadvise behind

A conversion uses each byte of its files once. Kept in the cache they would push out what others need, and finding pages
for them costs more than the copy itself where memory is full or, in a virtual machine, not yet the guest's. Writing
begins at once, so that the flush at the end has little left to wait for.

A piece that was just read is in its core's own cache: hashed there it takes half as long as out of memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["BLOCK_BYTES", "PIECE_BYTES", "OnceReader", "SeePiece", "write_once"]

SeePiece = Callable[[memoryview], object]
"""Is shown each piece that was read, while it is in the processor's cache: all of them together are what was read."""

BLOCK_BYTES = 8 << 20
"""What is written at a time, and what the system lets go of at a time behind a reader."""
PIECE_BYTES = 1 << 18
"""What is read at a time: several of it fit into a core's cache."""
FOLIO_BYTES = 2 << 20
"""Largest piece in which Linux caches a file, at places that are multiples of it; it lets go of whole ones."""
PAGE_BYTES = 4096
BEHIND_BYTES = 8 * BLOCK_BYTES
"""Without RWF_DONTCACHE: how far behind the place of writing pages are looked at again, by then clean."""
RWF_DONTCACHE = 0x80
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)

_refusing: set[int] = set()
"""Devices whose file system does not know RWF_DONTCACHE, or all with a kernel that does not."""


class OnceReader:
    """Parts of an opened file, as a rule in its order; what was read leaves the cache, on `close` the rest of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._first = self._place = 0
        """Bytes [first, place) were read and are still in the cache."""
        self._asks, self._asked = not _reads_far_ahead(descriptor), 0
        """Whether the system is asked for the next bytes, and up to where it was."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, buffer: memoryview, offset: int, see: SeePiece | None = None) -> int:
        """Fill a buffer of bytes from a place of the file; return the bytes read, fewer only at the file's end.

        Args:  see: is shown the bytes, but for a last piece that the file's end cuts off.
        """
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + PIECE_BYTES]
            count = self._fill(piece, offset + done)
            done += count
            if count < len(piece):
                break
            if see is not None:
                see(piece)
        return done

    def close(self) -> None:
        """Let go of what was read last; the file is closed by whoever opened it."""
        self._let_go()

    def _fill(self, piece: memoryview, place: int) -> int:
        if self._asks:
            self._ask(place)
        done = 0
        while done < len(piece) and (count := os.preadv(self._descriptor, [piece[done:]], place + done)):
            done += count
        self._pass(place, done)
        return done

    def _pass(self, place: int, count: int) -> None:
        if place != self._place:
            self._let_go()
            self._first = place - place % FOLIO_BYTES
        self._place = place + count
        if self._place - self._first >= BLOCK_BYTES + FOLIO_BYTES:
            self._let_go()

    def _let_go(self) -> None:
        _advise(self._descriptor, self._first, self._place - self._first, "POSIX_FADV_DONTNEED")
        self._first = self._place - self._place % FOLIO_BYTES

    def _ask(self, place: int) -> None:
        """Ask for the block behind the next one; at another place than the last for both."""
        if not self._asked - 2 * BLOCK_BYTES <= place <= self._asked:
            self._asked = place
        while self._asked < place + BLOCK_BYTES:
            _advise(self._descriptor, self._asked, BLOCK_BYTES, "POSIX_FADV_WILLNEED")
            self._asked += BLOCK_BYTES


def write_once(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes to a place of a file, and have the system begin to bring them to the disk.

    The last page, if it is filled in part, is written as usual: whoever writes on from there finds it in the cache.
    """
    done = 0
    while done < len(data):
        place = offset + done
        part = data[done : done + BLOCK_BYTES - place % BLOCK_BYTES]
        whole = len(part) - (place + len(part)) % PAGE_BYTES
        done += _write(descriptor, part[:whole], place) if whole > 0 else os.pwritev(descriptor, [part], place)


def _write(descriptor: int, part: memoryview, offset: int) -> int:
    if _may_pass(descriptor):
        try:
            return os.pwritev(descriptor, [part], offset, RWF_DONTCACHE)
        except OSError as error:
            _note_refusal(descriptor, error)
    count = os.pwritev(descriptor, [part], offset)
    first = max(0, offset - BEHIND_BYTES)
    _advise(descriptor, first, offset + count - first, "POSIX_FADV_DONTNEED")
    return count


def _reads_far_ahead(descriptor: int) -> bool:
    """Return whether the system reads a block ahead by itself: a network's file system and most disks do not."""
    device = os.fstat(descriptor).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return int(setting.read_text(encoding="ascii")) << 10 >= BLOCK_BYTES
    except (OSError, ValueError):
        return False


def _may_pass(descriptor: int) -> bool:
    return hasattr(os, "RWF_NOWAIT") and os.fstat(descriptor).st_dev not in _refusing


def _note_refusal(descriptor: int, error: OSError) -> None:
    """Remember that a file system does not know the flag.

    Raises:  the error, if it says something else.
    """
    if error.errno not in UNSUPPORTED:
        raise error
    _refusing.add(os.fstat(descriptor).st_dev)


def _advise(descriptor: int, offset: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise") and length:
        os.posix_fadvise(descriptor, offset, length, getattr(os, advice))
