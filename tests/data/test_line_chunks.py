"""Chunks of whole lines: every line once, from any position, out of any packing, in bounded memory."""

import gzip
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data.line_chunks import read_chunks, read_files
from megatron_xmtf.data.records import InputPosition, LineChunk
from megatron_xmtf.errors import RecordError

LINE = b'{"inputs": "How many months?", "targets": "twelve"}\n'


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=12),
    chunk_bytes=st.integers(1, 40),
    ended=st.booleans(),
)
def test_chunks_hold_every_line_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], chunk_bytes: int, ended: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.mktemp("chunks") / "f.jsonl"
    path.write_bytes(data)
    number = 1
    for chunk in read_chunks(path, chunk_bytes=chunk_bytes):
        assert chunk.first_line == number
        number += chunk.data.count(b"\n")
    joined = b"".join(chunk.data for chunk in read_chunks(path, chunk_bytes=chunk_bytes))
    assert joined == data.removeprefix(b"\xef\xbb\xbf")


def pack(content: bytes, suffix: str) -> bytes:
    """Pack content in two members or frames, cut anywhere."""
    half = len(content) // 3
    if suffix == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
        return zstandard.compress(content[:half]) + skippable + zstandard.compress(content[half:])
    return content


def lines_of(chunks: list[LineChunk]) -> list[tuple[str, int, bytes]]:
    """Name every line by its file and number."""
    return [(c.path, c.first_line + n, line) for c in chunks for n, line in enumerate(c.data.splitlines())]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_from_each_position_the_rest_follows(tmp_path: Path, suffix: str) -> None:
    paths = []
    for number in range(3):
        lines = [b'{"n": %d}' % n + b" " * (n % 40) for n in range(number * 100, number * 100 + 100)]
        content = (b"\xef\xbb\xbf" if number == 1 else b"") + b"\n".join(lines) + (b"\n" if number else b"")
        paths.append(tmp_path / f"{number}.jsonl{suffix}")
        paths[-1].write_bytes(pack(content, suffix))
    options = read_chunks.__kwdefaults__
    before, options["chunk_bytes"] = options["chunk_bytes"], 300
    try:
        whole = list(read_files(paths))
        assert len(whole) > 20
        assert whole[-1].position.bytes_read == sum(path.stat().st_size for path in paths)
        for index, chunk in enumerate(whole):
            rest = list(read_files(paths, start=chunk.position))
            assert b"".join(c.data for c in rest) == b"".join(c.data for c in whole[index + 1 :])
            assert lines_of(rest) == lines_of(whole[index + 1 :])
    finally:
        options["chunk_bytes"] = before


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_that_are_not_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r.jsonl{suffix}"
    whole = pack(LINE * 100, suffix)
    kind = {".gz": "gzip", ".zst": "zstd"}[suffix]
    flipped = bytearray(whole)
    flipped[-6 if suffix == ".gz" else -9] ^= 0xFF  # the checksum, or the last block
    for damaged in (whole[:-5], whole[: len(whole) // 2], b"not packed", whole + b"rubbish", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=f"is a damaged or truncated {kind} file"):
            list(read_chunks(path))
    path.write_bytes(whole)
    with pytest.raises(RecordError, match="ends before the line where reading was to go on"):
        list(read_chunks(path, start=InputPosition(offset=len(LINE) * 101, line=102)))


def test_a_frame_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    """Its header asks for 2 GiB; an empty last block follows."""
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes((0xFD2FB528).to_bytes(4, "little") + bytes([0x00, (31 - 10) << 3]) + bytes([1, 0, 0]))
    with pytest.raises(RecordError, match="damaged or truncated zstd.*too much memory"):
        list(read_chunks(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    """100 MB of lines in less than 20 MB, from the beginning and from near the end; a line of zeros is refused."""
    block = LINE * 20_000
    content = gzip.compress(block, 1) * 100 if suffix == ".gz" else zstandard.compress(block) * 100
    path = tmp_path / f"r.jsonl{suffix}"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        size = sum(len(chunk.data) for chunk in read_chunks(path))
        near_the_end = InputPosition(offset=100 * len(block) - len(LINE), line=100 * 20_000)
        assert [chunk.data for chunk in read_chunks(path, start=near_the_end)] == [LINE]
        peak = tracemalloc.get_traced_memory()[1]
        assert size == 100 * len(block) > 100e6
        assert peak < 20e6
        zeros = b"\0" * (1 << 27)
        path.write_bytes(gzip.compress(zeros, 1) if suffix == ".gz" else zstandard.compress(zeros))
        with pytest.raises(RecordError, match="is longer than 64 MiB"):
            list(read_chunks(path))
    finally:
        tracemalloc.stop()
