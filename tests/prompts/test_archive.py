"""The one file inside a .tar: found, read, and nothing else done."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.errors import ConfigError, RecordError
from megatron_xmtf.prompts import Source, read_rows

ROWS = [{"a": number, "b": "x" * (number % 700)} for number in range(300)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def archive(*entries: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive as the standard library writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as made:
        for entry, content in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def rows_of(path: Path, content: bytes, member: str | None = None) -> list[dict]:
    path.write_bytes(content)
    return list(read_rows(Source(path, member=member)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_the_only_file(tmp_path: Path, form: int, suffix: str, compress) -> None:
    path = tmp_path / f"rows.jsonl.tar{suffix}"
    content = archive((special("folder/", tarfile.DIRTYPE, ""), b""), ("folder/rows.jsonl", JSONL), form=form)
    assert rows_of(path, compress(content)) == ROWS
    consumed: list[int] = []
    list(read_rows(path, on_bytes=consumed.append))
    assert 0.8 * path.stat().st_size <= sum(consumed) <= path.stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@given(
    names=st.lists(st.text("ab/é", min_size=1, max_size=300).map(lambda name: f"n{name}e"), unique=True, max_size=4),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    sizes=st.lists(st.integers(0, 3000), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_named_member_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], form: int, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "rows.tar"
    entries = [(name, (name[:5] * size)[:size].encode() + b"\n") for name, size in zip(names, sizes, strict=False)]
    path.write_bytes(archive(*entries, form=form))
    with tarfile.open(path) as oracle:
        stored = {info.name: oracle.extractfile(info).read() for info in oracle.getmembers()}
    for name, content in stored.items():
        rows = read_rows(Source(path, format="lines", member=name))
        assert [row["text"] for row in rows] == [text for text in content.decode().split("\n") if text]


def test_several_files_need_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.tar.gz"
    content = gzip.compress(
        archive(("train.jsonl", JSONL), ("dev.jsonl", b'{"a": 1}\n'), ("../../etc/passwd", b"{}\n"))
    )
    assert rows_of(path, content, "dev.jsonl") == [{"a": 1}]
    assert rows_of(path, content, "../../etc/passwd") == [{}]  # a name in the archive, and nothing more
    with pytest.raises(RecordError, match=r"holds 3 files \(train.jsonl, dev.jsonl, .*declare member"):
        rows_of(path, content)
    with pytest.raises(RecordError, match="no file 'dev.json'; nearest: dev.jsonl"):
        rows_of(path, content, "dev.json")
    with pytest.raises(RecordError, match="holds 0 files"):
        rows_of(path, gzip.compress(archive()))
    with pytest.raises(RecordError, match="'a' twice"):
        rows_of(path, gzip.compress(archive(("a", b"{}\n"), ("a", b"{}\n"))))
    with pytest.raises(ConfigError, match="member names a file of a .tar archive; this is none"):
        read_rows(Source(tmp_path / "rows.jsonl", member="dev.jsonl"))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_only_regular_files_are_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "rows.jsonl.tar"
    with pytest.raises(RecordError, match="'bad' is not a regular file"):
        rows_of(path, archive((special("bad", kind), b"")))
    with pytest.raises(RecordError, match="'bad' is not a regular file"):
        rows_of(path, archive(("rows.jsonl", JSONL), (special("bad", kind), b"")))


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.tar"
    whole = archive(("rows.jsonl", JSONL), form=tarfile.USTAR_FORMAT)
    end_of_data = 512 + -(-len(JSONL) // 512) * 512
    for size in (0, 100, 512, 5000, end_of_data - 1, end_of_data):
        with pytest.raises(RecordError, match="damaged or cut off"):
            rows_of(path, whole[:size])
    altered = bytearray(whole)
    altered[0] ^= 1
    for content in (bytes(altered), JSONL.ljust(2000)):
        with pytest.raises(RecordError, match="is no tar archive, or is damaged at its byte 0"):
            rows_of(path, content)
    with pytest.raises(RecordError, match="damaged or cut off"):
        rows_of(tmp_path / "rows.jsonl.tar.gz", gzip.compress(whole)[:-100])


def test_a_header_that_asks_for_memory(tmp_path: Path) -> None:
    """`tarfile` would read the eight gigabytes that such a header announces as a name."""
    path = tmp_path / "rows.jsonl.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = special("x", kind, "")
        info.size = 8 << 30
        header = info.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(RecordError, match="a header of 8,589,934,592 bytes"):
            rows_of(path, header + bytes(4096))
    for record in (b"9999 path=a\n", b"path=a\n", b"3 \n"):
        info = special("x", tarfile.XHDTYPE, "")
        info.size = len(record)
        with pytest.raises(RecordError, match="damaged pax header"):
            rows_of(path, info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + archive(("a", b"{}\n")))
    info = special("x", tarfile.XHDTYPE, "")
    record = b"22 GNU.sparse.major=1\n"
    info.size = len(record)
    with pytest.raises(RecordError, match="sparse file"):
        rows_of(path, info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + archive(("a", b"{}\n")))
