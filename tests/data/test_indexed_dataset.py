"""Byte equality with Megatron-Core's builder, both ways of reading, and refusal of every damaged file."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megatron_xmtf.data.indexed_dataset import HEADER, IndexedDataset, token_dtype
from megatron_xmtf.data.indexed_writer import IndexedDatasetWriter
from megatron_xmtf.errors import DatasetError

SEQUENCES = [[5, 6, 7], [8], [9, 10], [], [65499] * 50]


def write_ours(prefix: Path, sequences: list[list[int]], dtype: np.dtype) -> IndexedDatasetWriter:
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        for start in range(0, len(sequences), 2):  # in batches, as preprocessing writes
            part = sequences[start : start + 2]
            writer.add(np.array(sum(part, []), np.int64), np.array([len(one) for one in part], np.int64))
    return writer


def write_megatron(prefix: Path, sequences: list[list[int]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for one in sequences:
        builder.add_document(torch.tensor(one, dtype=torch.int64), [len(one)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_equal_megatron_and_each_reads_the_other(tmp_path: Path, dtype: type) -> None:
    write_ours(tmp_path / "ours", SEQUENCES, np.dtype(dtype))
    write_megatron(tmp_path / "theirs", SEQUENCES, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    ours, theirs = IndexedDataset(tmp_path / "theirs"), MegatronDataset(str(tmp_path / "ours"))
    assert len(ours) == len(theirs) == len(SEQUENCES)
    for index, expected in enumerate(SEQUENCES):
        assert ours[index].tolist() == expected == theirs[index].tolist()
    assert ours.num_tokens == 56 and ours.lengths.tolist() == [3, 1, 2, 0, 50]
    assert ours.document_indices.tolist() == theirs.document_indices.tolist()


def test_documents_of_several_sequences_equal_megatron(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedDatasetWriter(tmp_path / "ours", dtype=np.dtype(np.int32)) as writer:
        tokens = np.concatenate([np.arange(5), np.arange(4)])
        writer.add(tokens, np.array([2, 3, 4]), document_lengths=np.array([2, 1]))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_worked_example_of_the_docstring(tmp_path: Path) -> None:
    write_ours(tmp_path / "d", [[5, 6, 7], [8], [9, 10]], np.dtype(np.uint16))
    assert (tmp_path / "d.bin").read_bytes() == bytes.fromhex("050006000700080009000a00")
    index = (tmp_path / "d.idx").read_bytes()
    assert index[34:46] == struct.pack("<3i", 3, 1, 2)
    assert index[46:70] == struct.pack("<3q", 0, 6, 8)
    assert index[70:] == struct.pack("<4q", 0, 1, 2, 3)


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 250880])
def test_token_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_empty_dataset(tmp_path: Path) -> None:
    write_ours(tmp_path / "ours", [], np.dtype(np.int32))
    write_megatron(tmp_path / "theirs", [], np.int32)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert len(IndexedDataset(tmp_path / "ours")) == 0


def test_offsets_pass_2_to_the_31(tmp_path: Path) -> None:
    """An index over 6 GiB of tokens (a sparse .bin) is written and read in 64 bits."""
    with IndexedDatasetWriter(tmp_path / "d", dtype=np.dtype(np.int32)) as writer:
        # Lengths as if 3 x 2^29 tokens had been written; the tokens themselves are added below.
        writer._parts[".lengths"].write(np.array([2**29, 2**29, 2**29], "<i4").tobytes())
    with open(tmp_path / "d.bin", "r+b") as stream:
        stream.truncate(3 * 2**29 * 4)
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset._offsets.tolist() == [0, 2**31, 2**32]
    assert dataset.num_tokens == 3 * 2**29 and dataset[2][-1] == 0


def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="65536 do not fit uint16"):
        write_ours(tmp_path / "d", [[1, 65536]], np.dtype(np.uint16))
    assert list(tmp_path.iterdir()) == []


def test_pickled_dataset_reads_the_same(tmp_path: Path) -> None:
    write_ours(tmp_path / "d.v1", SEQUENCES, np.dtype(np.int32))
    copy = pickle.loads(pickle.dumps(IndexedDataset(tmp_path / "d.v1")))
    assert copy[4].tolist() == SEQUENCES[4]
    with pytest.raises(IndexError):
        copy[5]


def good(tmp_path: Path) -> Path:
    write_ours(tmp_path / "d", SEQUENCES, np.dtype(np.int32))
    return tmp_path / "d"


@pytest.mark.parametrize("kept", [-1, 112, 0])
def test_truncated_bin_is_refused_with_both_sizes(tmp_path: Path, kept: int) -> None:
    prefix = good(tmp_path)
    path = tmp_path / "d.bin"
    data = path.read_bytes()[:kept]
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"d\.bin is {len(data)} bytes, but its index lists 5 sequences in 224"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "not an MMIDIDX index"),
        (9, struct.pack("<Q", 2), "format version 2"),
        (17, b"\x07", "floating point"),
        (17, b"\x63", "dtype code 99"),
        (17, b"\x08", "starts at byte"),  # uint16: every offset is then wrong
        (18, struct.pack("<Q", 2**62), "announces 4611686018427387904 sequences"),
        (26, struct.pack("<Q", 0), "empty document list"),
        (26, struct.pack("<Q", 2**63), "cut off or altered"),
        (34, struct.pack("<i", -3), "never negative"),
        (34, struct.pack("<i", 4), "starts at byte"),
        (34 + 4 * 5 + 8, struct.pack("<q", 2**62), "starts at byte 4611686018427387904"),
        (34 + 12 * 5, struct.pack("<q", 1), "documents run from sequence 1"),
        (34 + 12 * 5 + 8, struct.pack("<q", 5), "documents do not follow"),
    ],
)
def test_each_damaged_field_is_named(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    prefix = good(tmp_path)
    path = tmp_path / "d.idx"
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        IndexedDataset(prefix)


def test_missing_legacy_and_multimodal_are_told_apart(tmp_path: Path) -> None:
    prefix = good(tmp_path)
    index = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(index + bytes(5))
    with pytest.raises(DatasetError, match="multimodal"):
        IndexedDataset(prefix)
    (tmp_path / "d.idx").write_bytes(b"TNTIDX\x00\x00" + index[8:])
    with pytest.raises(DatasetError, match="legacy"):
        IndexedDataset(prefix)
    (tmp_path / "d.idx").write_bytes(index[:20])
    with pytest.raises(DatasetError, match="20 bytes, shorter than its 34-byte header"):
        IndexedDataset(prefix)
    (tmp_path / "d.idx").unlink()
    with pytest.raises(DatasetError, match="does not exist"):
        IndexedDataset(prefix)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_of_an_index_is_refused_or_reads_in_range(tmp_path: Path, data: st.DataObject) -> None:
    prefix = good(tmp_path)
    path = tmp_path / "d.idx"
    content = bytearray(path.read_bytes())
    edits = data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6))
    for offset, value in edits:
        content[offset] = value
    fields = [9, 18, 26]
    for offset in data.draw(st.lists(st.sampled_from(fields), max_size=1)):
        content[offset : offset + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    cut = data.draw(st.integers(0, len(content) + 20))
    content = content[:cut] if cut <= len(content) else content + bytes(cut - len(content))
    if data.draw(st.booleans()):
        path.write_bytes(content)
    else:  # whole length, so that deeper checks are reached
        path.write_bytes(bytes(content).ljust(HEADER.size + 12 * 5 + 8 * 6, b"\x00")[: HEADER.size + 12 * 5 + 8 * 6])
    try:
        dataset = IndexedDataset(prefix)
    except DatasetError:
        return
    assert sum(len(dataset[index]) for index in range(len(dataset))) == dataset.num_tokens == 56
