"""Read and write large files once, without filling the system's cache with them.

    Linux from 6.14    RWF_DONTCACHE: a page leaves when it has been used, unless it was there before
    other Linux        posix_fadvise(DONTNEED) behind what was used: flushes what is dirty, lets go of what is clean
    elsewhere          as usual

A conversion uses each byte of its files once. Kept in the cache they would push out what others need, and finding pages
for them costs more than the copy itself where memory is full or, in a virtual machine, not yet the guest's. Writing
begins at once, so that the flush at the end has little left to wait for.
"""

from __future__ import annotations

import errno
import os

__all__ = ["BLOCK_BYTES", "KEPT_BYTES", "OnceReader", "write_once"]

BLOCK_BYTES = 8 << 20
"""What is handed to the system at a time."""
KEPT_BYTES = 2 << 20
"""Largest piece in which Linux caches a file, at places that are multiples of it."""
PAGE_BYTES = 4096
BEHIND_BYTES = 8 * BLOCK_BYTES
"""Without RWF_DONTCACHE: how far behind the place of writing pages are looked at again, by then clean."""
RWF_DONTCACHE = 0x80
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)

_refusing: set[int] = set()
"""Devices whose file system does not know RWF_DONTCACHE, or all with a kernel that does not."""


class OnceReader:
    """Parts of an opened file, each byte read once, as a rule in the order of the file.

    The system is asked for whole blocks: a block that is used in part would leave the cache, and be read again for the
    part that follows it. What a part leaves of its last block is kept here.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._kept = memoryview(bytearray(KEPT_BYTES))
        self._place, self._length = 0, 0
        """Of the bytes kept."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer of bytes from a place of the file; return the bytes read, fewer only at the file's end."""
        done = 0
        while done < len(buffer):
            place = offset + done
            if self._place <= place < self._place + self._length:
                part = self._kept[place - self._place : self._length][: len(buffer) - done]
                buffer[done : done + len(part)] = part
                done += len(part)
                continue
            left = len(buffer) - done
            if place % KEPT_BYTES or left < KEPT_BYTES:
                self._place = place - place % KEPT_BYTES
                self._length = _read_all(self._descriptor, self._kept, self._place)
                if self._place + self._length <= place:
                    break
                continue
            count = min(left - left % KEPT_BYTES, BLOCK_BYTES - place % BLOCK_BYTES)
            read = _read_all(self._descriptor, buffer[done : done + count], place)
            done += read
            if read < count:
                break
        return done


def write_once(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes to a place of a file, and have the system begin to bring them to the disk.

    Pages that are filled in part are written as usual: a neighbour's bytes go to them, before or behind.
    """
    done = 0
    while done < len(data):
        place = offset + done
        to_page, to_block = -place % PAGE_BYTES, BLOCK_BYTES - place % BLOCK_BYTES
        part = data[done : done + (to_page or to_block)]
        whole = len(part) - (0 if to_page else len(part) % PAGE_BYTES)
        if to_page or not whole:
            done += os.pwritev(descriptor, [part], place)
        else:
            done += _write(descriptor, part[:whole], place)


def _read_all(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer; return the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(buffer) and (count := _read(descriptor, buffer[done:], offset + done)):
        done += count
    return done


def _read(descriptor: int, part: memoryview, offset: int) -> int:
    if _may_pass(descriptor):
        try:
            return os.preadv(descriptor, [part], offset, RWF_DONTCACHE)
        except OSError as error:
            _note_refusal(descriptor, error)
    _advise(descriptor, offset + len(part), len(part), "POSIX_FADV_WILLNEED")
    count = os.preadv(descriptor, [part], offset)
    _advise(descriptor, offset, count, "POSIX_FADV_DONTNEED")
    return count


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
