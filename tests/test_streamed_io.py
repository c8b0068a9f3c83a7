"""Files that pass through: every byte where it belongs, nothing left in the cache, whatever the kernel knows."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf import streamed_io
from megatron_xmtf.checkpoint.hashed_reading import HashedReading
from megatron_xmtf.read_ahead import read_ahead
from megatron_xmtf.streamed_io import BLOCK_BYTES, FOLIO_BYTES, PIECE_BYTES, OnceReader, write_once

MIB = 1 << 20


@pytest.fixture(params=["flag", "advice", "neither"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With RWF_DONTCACHE where this kernel has it; on a file system that refuses it; without any advice."""
    name: str = request.param
    monkeypatch.setattr(streamed_io, "_refusing", set())
    if name != "flag":
        plain_read, plain_write = os.preadv, os.pwritev

        def refuse(plain: Any) -> Any:
            def call(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> Any:
                if flags:
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
                return plain(descriptor, buffers, offset)

            return call

        monkeypatch.setattr(os, "preadv", refuse(plain_read))
        monkeypatch.setattr(os, "pwritev", refuse(plain_write))
    if name == "neither":
        monkeypatch.delattr(os, "posix_fadvise")
    return name


@pytest.fixture
def data() -> bytes:
    return random.Random(5).randbytes(20 * MIB + 4097)


def pages_in_cache(path: Path) -> int:
    """Ask the kernel which pages of a file are in memory."""
    size = path.stat().st_size
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), size) as mapped:
        found = (ctypes.c_ubyte * -(-size // 4096))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        return sum(page & 1 for page in found)


@pytest.mark.parametrize("first", [0, 1, 4096, 4097, 8 * MIB - 1])
def test_bytes_are_written_where_they_belong_and_read_back(way: str, data: bytes, tmp_path: Path, first: int) -> None:
    """In pieces of odd lengths, beside what others wrote to the same pages."""
    path = tmp_path / "file"
    path.write_bytes(b"before" * 2 * MIB)
    expected = bytearray(path.read_bytes())
    with open(path, "r+b", buffering=0) as stream:
        place, source, lengths = first, memoryview(data), random.Random(first)
        while source:
            count = lengths.choice([1, 100, 4096, 70_000, 3 * MIB + 5, 9 * MIB])
            write_once(stream.fileno(), source[:count], place)
            place, source = place + len(source[:count]), source[count:]
    expected[first : first + len(data)] = data
    assert path.read_bytes() == expected
    found = bytearray(len(data) + 10)
    with open(path, "rb") as stream:
        reader = OnceReader(stream.fileno())
        assert reader.read_into(memoryview(found)[: len(data)], first) == len(data)
        assert found == data + bytes(10)
        assert reader.read_into(memoryview(found), len(expected) - 5) == 5, "the file ends there"
        assert reader.read_into(memoryview(found), len(expected) + 5) == 0


def test_what_passes_leaves_the_cache(way: str, data: bytes, tmp_path: Path) -> None:
    """And without the advice it stays, so the measure sees it."""
    path = tmp_path / "file"
    path.write_bytes(data)
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    if way != "neither":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if pages_in_cache(path):
            pytest.skip("this file system keeps its files in memory")
    OnceReader(descriptor).read_into(memoryview(bytearray(len(data))), 0)
    os.close(descriptor)
    pages = len(data) // 4096
    assert pages_in_cache(path) > 0.9 * pages if way == "neither" else pages_in_cache(path) < 0.5 * pages


def test_parts_of_any_length_take_each_byte_from_the_system_once(
    way: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other; another order is right too."""
    path = tmp_path / "file"
    path.write_bytes(data)
    taken, plain = [0], os.preadv

    def count(*words: Any) -> int:
        read = plain(*words)
        taken[0] += read
        return read

    monkeypatch.setattr(os, "preadv", count)
    lengths, place = random.Random(3), 0
    with open(path, "rb", buffering=0) as stream:
        reader = OnceReader(stream.fileno())
        while place < len(data):
            part = bytearray(min(lengths.choice([1, 5, 4096, 70_001, 3 * MIB + 5, 9 * MIB]), len(data) - place))
            assert reader.read_into(memoryview(part), place) == len(part)
            assert part == data[place : place + len(part)]
            place += len(part)
        assert taken == [len(data)]
        for place in (7 * MIB + 1, 3, len(data) - 9, FOLIO_BYTES - 1, FOLIO_BYTES, 0):
            part = bytearray(9)
            assert reader.read_into(memoryview(part), place) == 9
            assert part == data[place : place + 9]


def test_a_file_system_that_refuses_the_flag_is_asked_once(data: bytes, tmp_path: Path, way: str) -> None:
    asked = [0]
    plain = os.pwritev

    def count(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        asked[0] += flags != 0
        return plain(descriptor, buffers, offset, flags)

    os.pwritev = count  # type: ignore[assignment]
    try:
        with open(tmp_path / "file", "wb", buffering=0) as stream:
            write_once(stream.fileno(), memoryview(data), 0)
    finally:
        os.pwritev = plain
    if way != "flag":
        assert asked == [1]
    assert (tmp_path / "file").read_bytes() == data


def test_other_errors_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with open(tmp_path / "file", "wb") as stream, pytest.raises(OSError, match="No space"):
        write_once(stream.fileno(), memoryview(bytes(MIB)), 0)


@pytest.mark.parametrize("order", ["of the file", "reversed", "any", "nothing", "all twice"])
def test_a_file_is_hashed_whole_whatever_is_asked_for(data: bytes, tmp_path: Path, order: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    cuts = sorted({0, len(data), *random.Random(1).sample(range(len(data)), 9)})
    parts = list(zip(cuts[::2], cuts[1::2], strict=False))
    asked = {"of the file": parts, "reversed": parts[::-1], "nothing": [], "all twice": [*parts, *parts]}
    shuffled = random.Random(2).sample(parts, len(parts))
    reading = HashedReading(path)
    for begin, end in asked.get(order, shuffled):
        buffer = bytearray(end - begin)
        assert reading.read_into(memoryview(buffer), begin) == end - begin
        assert buffer == data[begin:end]
    assert reading.finish() == hashlib.sha256(data).hexdigest()


def test_parts_that_overlap_are_hashed_once(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    reading = HashedReading(path)
    for begin, end in ((0, 5 * MIB), (4 * MIB, 9 * MIB), (len(data) - 7, len(data) + 7)):
        buffer = bytearray(end - begin)
        assert reading.read_into(memoryview(buffer), begin) == min(end, len(data)) - begin
        assert buffer[: len(data) - begin] == data[begin:end]
    assert reading.finish() == hashlib.sha256(data).hexdigest()


def test_reading_ahead_keeps_the_order_and_raises_where_the_item_stands() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number * number

    assert list(read_ahead([], read)) == []
    assert list(read_ahead([1, 2], read)) == [(1, 1), (2, 4)]
    reading = read_ahead([1, 2, 3, 4], read)
    assert [next(reading), next(reading)] == [(1, 1), (2, 4)]
    with pytest.raises(ValueError, match="the third"):
        next(reading)


@pytest.mark.parametrize("ahead", [1, 2])
def test_reading_ahead_is_no_further_ahead_than_said(ahead: int) -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    reading: Iterator[tuple[int, int]] = read_ahead(range(10), read, ahead=ahead)
    assert next(reading) == (0, 0)
    reading.close()  # type: ignore[attr-defined]
    assert begun == list(range(len(begun))) and 1 <= len(begun) <= 1 + ahead


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("first", [0, 3, 5 * MIB + 1])
def test_what_is_seen_is_what_is_read(data: bytes, tmp_path: Path, hashed: bool, first: int) -> None:
    """Piece by piece and once; a last piece that the file's end cuts off is not shown: its reader will complain."""
    path, seen = tmp_path / "file", bytearray()
    path.write_bytes(data)
    with open(path, "rb", buffering=0) as stream:
        reader: Any = HashedReading(path) if hashed else OnceReader(stream.fileno())
        buffer = bytearray(3 * MIB + 17)
        assert reader.read_into(memoryview(buffer), first, seen.extend) == len(buffer)
        assert seen == buffer == data[first : first + len(buffer)]
        assert reader.read_into(memoryview(buffer), first, None) == len(buffer), "what was hashed before is read again"
        assert reader.read_into(memoryview(buffer)[: PIECE_BYTES + 5], len(data) - PIECE_BYTES - 4, seen.extend)
        assert seen[-PIECE_BYTES:] == data[-PIECE_BYTES - 4 : -4] and len(seen) == len(buffer) + PIECE_BYTES
        if hashed:
            assert reader.finish() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kib", [128, 8192, None])
def test_a_system_that_reads_little_ahead_is_asked_for_more(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kib: int | None
) -> None:
    """Before a byte is read its block has been asked for, at most two blocks ahead; anew behind a jump."""
    path = tmp_path / "file"
    path.write_bytes(data)
    read_text = Path.read_text

    def setting(self: Path, *words: Any, **more: Any) -> str:
        if self.name != "read_ahead_kb":
            return read_text(self, *words, **more)
        if kib is None:
            raise FileNotFoundError(str(self))
        return f"{kib}\n"

    asked: list[tuple[int, int]] = []

    def advise(_: int, place: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((place, place + length))

    monkeypatch.setattr(Path, "read_text", setting)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    with open(path, "rb", buffering=0) as stream:
        reader = OnceReader(stream.fileno())
        for place in (*range(0, 12 * MIB, MIB // 2), 1, 19 * MIB):
            assert reader.read_into(memoryview(bytearray(MIB // 2)), place) == MIB // 2
            if kib == 8192:
                continue
            ends = [end for begin, end in asked if begin <= place]
            assert place + MIB // 2 <= max(ends) and max(end for _, end in asked[-2:]) <= place + 2 * BLOCK_BYTES
    if kib == 8192:
        assert not asked
    else:
        assert asked[:2] == [(0, BLOCK_BYTES), (BLOCK_BYTES, 2 * BLOCK_BYTES)] and len(asked) < 9
