"""Open a file for reading by its suffixes: plain, .gz, .zst, and the one file inside a .tar of these.

Everything is streamed; nothing is written to the disk. What a hostile file can make us hold is bounded: one line
(64 MiB), the window of a zstd frame (128 MiB), the long name of an archive's member (1 MiB).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.archive import MemberStream, choose_member
from megatron_xmtf.prompts.sources import file_suffixes

__all__ = ["DAMAGE", "Lines", "decompressed", "read_lines"]

Lines = Generator[tuple[int, bytes], None, None]
"""(line number from 1, bytes of the line with its newline)."""

MAX_LINE_BYTES = 64 << 20
"""Longer lines are refused: a file without newlines must not fill the memory."""
MAX_WINDOW_BYTES = 128 << 20
"""What `zstd --long=27` needs, and zstd's own limit for decoding unless told otherwise."""
ZSTD_INPUT_BYTES = 2 << 10
"""Compressed bytes decoded at once: 4 bytes can stand for a block of 128 KiB, so these give at most 64 MiB."""
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What the decoders raise on a stream that is damaged or cut off."""


def read_lines(path: Path, *, member: str | None = None, on_bytes: Callable[[int], None] | None = None) -> Lines:
    """Yield the lines of a file, without a byte-order mark at its start.

    Args:    member: the file inside a .tar archive. on_bytes: called now and then with the bytes of the file on the
             disk that were consumed since the last call.
    Raises:  RecordError: damaged or cut off, a line over 64 MiB, an archive without the member.
    """
    with open(path, "rb") as raw, _opened(path, raw, member) as stream:
        reported = number = 0
        while line := _read_line(stream, path, number + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if on_bytes is not None and number % 64 == 0:
                on_bytes(raw.tell() - reported)
                reported = raw.tell()
            yield number, line
        if on_bytes is not None:
            on_bytes(raw.tell() - reported)


def _read_line(stream: IO[bytes], path: Path, number: int) -> bytes:
    try:
        line = stream.readline(MAX_LINE_BYTES + 1)
    except DAMAGE as error:
        raise RecordError(f"{path}:{number}: the file is damaged or cut off ({error}).") from error
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"{path}:{number} is longer than {MAX_LINE_BYTES >> 20} MiB; is this a file of lines?")
    return line


@contextmanager
def _opened(path: Path, raw: IO[bytes], member: str | None) -> Iterator[IO[bytes]]:
    suffixes = file_suffixes(path)
    with ExitStack() as stack:
        stream = stack.enter_context(decompressed(raw, suffixes))
        if "tar" in suffixes:
            # Once through the headers, so that a second file is refused before the first row; then again to read.
            try:
                chosen = choose_member(path, stream, member)
                raw.seek(0)
                stream = stack.enter_context(decompressed(raw, suffixes))
                yield stack.enter_context(io.BufferedReader(MemberStream(stream, chosen)))
            except DAMAGE as error:
                raise RecordError(f"{path}: the archive is damaged or cut off ({error}).") from error
        else:
            yield stream


@contextmanager
def decompressed(raw: IO[bytes], suffixes: list[str]) -> Iterator[IO[bytes]]:
    """Open what a file holds by the last of its suffixes, without dots; a failed read raises one of `DAMAGE`."""
    if suffixes[-1:] == ["gz"]:
        _refuse_empty(raw)
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("IO[bytes]", stream)
    elif suffixes[-1:] == ["zst"]:
        _refuse_empty(raw)
        with io.BufferedReader(_ZstdStream(raw), 1 << 17) as decoded:
            yield decoded
    else:
        yield raw


def _refuse_empty(raw: IO[bytes]) -> None:
    """Refuse a file of no bytes: even nothing is some bytes when it is compressed."""
    if not raw.read(1):
        raise RecordError(f"{raw.name}: the file is damaged or cut off (it has no bytes).")
    raw.seek(0)


class _ZstdStream(io.RawIOBase):
    """Decode the frames of a zstd file, one after the other, a little at a time."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._decoder.decompressobj()
        self._inside_frame = False
        self._unread = b""
        self._decoded = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        while not self._decoded:
            data = self._unread or self._raw.read(ZSTD_INPUT_BYTES)
            if not data:
                if self._inside_frame:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._decoded = memoryview(self._frame.decompress(data))
            self._inside_frame = not self._frame.eof
            self._unread = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._decoder.decompressobj()
        count = min(len(target), len(self._decoded))
        target[:count] = self._decoded[:count]
        self._decoded = self._decoded[count:]
        return count
