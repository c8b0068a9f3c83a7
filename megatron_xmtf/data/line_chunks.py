"""Cut input files into chunks of whole lines, from the beginning or from where an earlier run stopped.

.jsonl       read from any position at once
.jsonl.gz    streamed; to go on in the middle, what lies before is decompressed and dropped, no line is parsed
.jsonl.zst   likewise
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from megatron_xmtf.data.records import InputPosition, LineChunk
from megatron_xmtf.errors import RecordError
from megatron_xmtf.files import require_file
from megatron_xmtf.prompts.readers.streams import DAMAGE, decompressed

__all__ = ["read_chunks", "read_files"]

CHUNK_BYTES = 1 << 20
"""Bytes of lines handed to a worker at a time; some thousand records."""
LINE_LIMIT_BYTES = 1 << 26
"""Longest line that is read, 64 MiB: a file without line ends must not fill the memory."""
UTF8_MARK = b"\xef\xbb\xbf"
BEGINNING = InputPosition()


def read_files(
    paths: Sequence[Path], *, start: InputPosition = BEGINNING, on_block: Callable[[], None] = lambda: None
) -> Iterator[LineChunk]:
    """Cut files into chunks, one file after another, from `start` on; the rest is as of `read_chunks`.

    Raises:  as `read_chunks`.
    """
    earlier_bytes = 0
    for number, path in enumerate(paths):
        if number >= start.file:
            own_start = start if number == start.file else InputPosition(file=number)
            yield from read_chunks(path, start=own_start, earlier_bytes=earlier_bytes, on_block=on_block)
        earlier_bytes += path.stat().st_size


def read_chunks(
    path: Path,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    start: InputPosition = BEGINNING,
    earlier_bytes: int = 0,
    on_block: Callable[[], None] = lambda: None,
) -> Iterator[LineChunk]:
    """Cut a .jsonl, .jsonl.gz or .jsonl.zst file into chunks of whole lines; a byte order mark at its start is dropped.

    Args:    chunk_bytes: bytes read at a time. start: a position that an earlier chunk of the file gave.
             earlier_bytes: size of the files before this one, to be counted in `bytes_read`.
             on_block: called before each block is read, those left out too; may raise to stop.
    Raises:  MissingError: no such file. RecordError: a line over 64 MiB, a damaged .gz or .zst, or a file that ends
             before `start`.
    """
    require_file(path)
    suffix = path.suffix.removeprefix(".")
    with open(path, "rb") as raw, decompressed(raw, [suffix]) as stream:
        position, rest = start, b""
        try:
            _skip(stream, start.offset, seekable=stream is raw, on_block=on_block)
            while True:
                on_block()
                block = stream.read(chunk_bytes)
                end = block.rfind(b"\n") + 1
                data, rest = (rest + block[:end], block[end:]) if end else (b"", rest + block)
                if not block:
                    data, rest = rest, b""
                if data:
                    after = replace(
                        position,
                        offset=position.offset + len(data),
                        line=position.line + data.count(b"\n"),
                        bytes_read=earlier_bytes + raw.tell(),
                    )
                    if not position.offset:  # the first chunk: it begins with the whole first line
                        data = data.removeprefix(UTF8_MARK)
                    yield LineChunk(str(path), position.line, data, after)
                    position = after
                if not block:
                    return
                if len(rest) > LINE_LIMIT_BYTES:
                    limit = LINE_LIMIT_BYTES >> 20
                    raise RecordError(
                        f"{path}:{position.line} is longer than {limit} MiB; give one JSON object a line."
                    )
        except DAMAGE as error:
            kind = {"gz": "gzip", "zst": "zstd"}.get(suffix, "")
            raise RecordError(f"{path} is a damaged or truncated {kind} file ({error}); copy it again.") from error


def _skip(stream: IO[bytes], count: int, *, seekable: bool, on_block: Callable[[], None]) -> None:
    """Leave out the first `count` bytes."""
    if seekable:
        stream.seek(count)
        return
    while count:
        on_block()
        block = stream.read(min(count, CHUNK_BYTES))
        if not block:
            raise EOFError("it ends before the line where reading was to go on")
        count -= len(block)
