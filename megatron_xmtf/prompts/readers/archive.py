"""Find and read the one file inside a tar stream, without extracting anything.

    blocks of 512    header "train.jsonl", 4,538,142 bytes | 8,864 blocks of data | header ... | two blocks of zeros

Only regular files are ever read: a link, a device or a sparse file is refused. Headers are decoded by the standard
library's `tarfile.TarInfo`, long names by us, because `tarfile` reads as much memory as such a header asks for.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_xmtf.errors import RecordError, nearest_names

__all__ = ["Member", "MemberStream", "choose_member"]

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 1 << 20
"""Bound on the headers that carry long names; file systems stop at 4 KiB."""
MAX_MEMBERS = 1_000_000
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: its name, where its data begin in the decoded stream, and their bytes."""

    name: str
    offset: int
    size: int


def choose_member(path: Path, stream: IO[bytes], name: str | None) -> Member:
    """Return the member of that name, or the only one.

    Raises:  RecordError: none or several, no such name, a name given twice, a link, a damaged header.
             EOFError: the archive ends before its end mark.
    """
    members: dict[str, Member] = {}
    for member in _members(path, stream):
        if member.name in members:
            raise RecordError(f"{path} holds {member.name!r} twice; which one is meant cannot be said.")
        members[member.name] = member
        if len(members) > MAX_MEMBERS:
            raise RecordError(f"{path} holds over {MAX_MEMBERS:,} files; unpack it and list those to be read.")
    if name is not None:
        if name not in members:
            raise RecordError(f"{path} holds no file {name!r}; {nearest_names(name, members)}.")
        return members[name]
    if len(members) != 1:
        listed = ", ".join(list(members)[:3]) or "none"
        raise RecordError(f"{path} holds {len(members)} files ({listed}); declare member: the one to be read.")
    return next(iter(members.values()))


def _members(path: Path, stream: IO[bytes]) -> Iterator[Member]:
    """Yield the regular files; directories are passed over."""
    offset, long_name, long_size = 0, None, None
    while True:
        header = _read_exactly(stream, BLOCK)
        offset += BLOCK
        if header == bytes(BLOCK):
            return
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            if entry.size < 0:
                raise tarfile.HeaderError(f"size {entry.size:,}")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise RecordError(
                f"{path} is no tar archive, or is damaged at its byte {offset - BLOCK:,}: {error}."
            ) from error
        if entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            value = _read_exactly(stream, _padded(_bounded(path, entry.size)))
            offset += len(value)
            value = value[: entry.size]
            if entry.type == tarfile.GNUTYPE_LONGNAME:
                long_name = value.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif entry.type == tarfile.XHDTYPE:
                long_name, long_size = _pax_name_and_size(path, value, long_name)
            continue
        name = long_name or entry.name
        size = entry.size if long_size is None else long_size
        long_name = long_size = None
        if entry.type == tarfile.DIRTYPE:
            size = 0
        elif entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise RecordError(
                f"{path}: {name!r} is not a regular file (tar type {entry.type.decode('latin-1')!r}); links, devices "
                "and sparse files are not read."
            )
        else:
            yield Member(name, offset, size)
        for start in range(0, _padded(size), READ_BYTES):
            _read_exactly(stream, min(READ_BYTES, _padded(size) - start))
        offset += _padded(size)


def _bounded(path: Path, size: int) -> int:
    if size > MAX_NAME_BYTES:
        raise RecordError(f"{path}: a header of {size:,} bytes; over {MAX_NAME_BYTES:,} is no file name.")
    return size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_name_and_size(path: Path, data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Read `path` and `size` of a pax header, whose records are `LENGTH key=value\\n`, LENGTH of the whole record."""
    size = None
    while data:
        length, separator, _ = data.partition(b" ")
        if not separator or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise RecordError(f"{path}: damaged pax header of the archive: {data[:40]!r}.")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        data = data[int(length) :]
        if key.startswith(b"GNU.sparse"):
            raise RecordError(f"{path} holds a sparse file, which is not read; make the archive anew without --sparse.")
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size" and value.isdigit():
            size = int(value)
    return name, size


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise EOFError("it ends before the archive's end mark")
        data += more
    return data


class MemberStream(io.RawIOBase):
    """Read the bytes of one member out of a decoded archive, from its start."""

    def __init__(self, stream: IO[bytes], member: Member) -> None:
        self._stream = stream
        self._left = member.size
        for start in range(0, member.offset, READ_BYTES):
            _read_exactly(stream, min(READ_BYTES, member.offset - start))

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as the member goes; 0 at its end."""
        count = min(len(target), self._left)
        target[:count] = _read_exactly(self._stream, count)
        self._left -= count
        return count
