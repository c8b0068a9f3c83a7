"""Plain, gzip and zstd streams: the same lines, damage seen, memory bounded."""

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.streams import read_lines

TEXT = "".join(f"line {number} \u00fc\n" for number in range(5000)).encode()
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"notes"


def in_frames(text: bytes) -> bytes:
    """As pzstd writes: several frames, and some that hold no data."""
    compress = zstandard.ZstdCompressor().compress
    return SKIPPABLE_FRAME + compress(text[:777]) + compress(b"") + compress(text[777:]) + SKIPPABLE_FRAME


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".frames.zst": in_frames,
    ".members.gz": lambda text: gzip.compress(text[:777]) + gzip.compress(text[777:]),
}


def lines_of(path: Path, content: bytes) -> list[bytes]:
    path.write_bytes(content)
    return [line for _, line in read_lines(path)]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_same_lines_whatever_the_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.txt{suffix}"
    assert lines_of(path, COMPRESSORS[suffix](TEXT)) == TEXT.splitlines(keepends=True)
    consumed: list[int] = []
    numbers = [number for number, _ in read_lines(path, on_bytes=consumed.append)]
    assert numbers == list(range(1, 5001))
    assert sum(consumed) == path.stat().st_size and len(consumed) > 50


@given(text=st.binary(max_size=3000), cut=st.integers(0, 3000), split=st.integers(0, 3000))
@settings(max_examples=80, deadline=None)
def test_zstd_round_trip_at_any_split(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, cut: int, split: int
) -> None:
    path = tmp_path_factory.mktemp("zst") / "rows.zst"
    compress = zstandard.ZstdCompressor().compress
    assert b"".join(lines_of(path, compress(text[:split]) + compress(text[split:]))) == text.removeprefix(
        b"\xef\xbb\xbf"
    )
    whole = compress(text)
    if cut < len(whole):
        with pytest.raises(RecordError, match="damaged or cut off"):
            lines_of(path, whole[:cut])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_is_always_seen(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    whole = COMPRESSORS[suffix](TEXT)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"more", bytes(flipped), TEXT):
        with pytest.raises(RecordError, match=r"damaged or cut off"):
            lines_of(path, content)


def test_window_of_a_hostile_frame_is_refused(tmp_path: Path) -> None:
    """A frame may ask for a window of terabytes in its header of a few bytes."""
    path = tmp_path / "rows.zst"
    for log, accepted in ((27, True), (28, False)):
        # RFC 8878: magic, descriptor without a content size, window descriptor (exponent << 3), last raw block of 2.
        frame = struct.pack("<IBB", 0xFD2FB528, 0, (log - 10) << 3) + (1 | 2 << 3).to_bytes(3, "little") + b"a\n"
        if accepted:
            assert lines_of(path, frame) == [b"a\n"]
        else:
            with pytest.raises(RecordError, match="damaged or cut off.*(memory|window|parameter)"):
                lines_of(path, frame)


def test_a_bomb_fills_no_memory(tmp_path: Path) -> None:
    """A gigabyte in 130 KB: one endless line is refused, short lines are streamed."""
    path = tmp_path / "rows.jsonl.zst"
    compressor = zstandard.ZstdCompressor()
    endless, short = compressor.compress(bytes(1 << 30)), compressor.compress((b" " * 1023 + b"\n") * (1 << 18))
    assert len(endless) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="longer than 64 MiB"):
            lines_of(path, endless)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
        tracemalloc.reset_peak()
        path.write_bytes(short)
        assert sum(1 for _ in read_lines(path)) == 1 << 18
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
