"""Nothing in a checkpoint runs, whatever was put into it; and what is read is what was written."""

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_xmtf.checkpoint.reader import CheckpointReader, check_safe
from megatron_xmtf.checkpoint.row_ranges import row_ranges
from megatron_xmtf.checkpoint.safe_read import read_metadata
from megatron_xmtf.checkpoint.stored_chunk import StoredChunk
from megatron_xmtf.errors import CorruptCheckpointError, MissingError
from tests.torch_dist_files import write_chunks

WEIGHT = torch.arange(60, dtype=torch.float32).reshape(10, 6)


class Payload:
    """Pickles to a call that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write_chunks(
        directory,
        [
            ("weight", WEIGHT[:4], (0, 0), (10, 6)),
            ("weight", WEIGHT[4:, :2], (4, 0), (10, 6)),
            ("weight", WEIGHT[4:, 2:], (4, 2), (10, 6)),
            ("bias", torch.ones(3, dtype=torch.bfloat16), (0,), (3,)),
        ],
    )
    return directory


def load_unsafe(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())


def store(directory: Path, value: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(value))


def test_rows_are_read_across_chunks(checkpoint: Path) -> None:
    check_safe(checkpoint)
    with CheckpointReader(checkpoint) as reader:
        assert torch.equal(reader.read("weight"), WEIGHT)
        for rows in ((0, 0), (0, 4), (3, 6), (9, 10)):
            assert torch.equal(reader.read("weight", rows=rows), WEIGHT[rows[0] : rows[1]])
        assert reader.read("bias").dtype == torch.bfloat16
        assert reader.tensors["weight"].bytes == 240


@pytest.mark.parametrize("way", ["kept", "once", "hashed"])
def test_all_numbers_that_are_returned_are_shown(tmp_path: Path, way: str) -> None:
    """In pieces of a core's cache where each byte is read once, across chunks, of one layer of several."""
    weight = torch.arange(900_000, dtype=torch.float32).view(1000, 900)
    chunks = [("weight", weight[:700], (0, 0), (1000, 900)), ("weight", weight[700:], (700, 0), (1000, 900))]
    write_chunks(
        tmp_path, [*chunks, ("scalar", torch.tensor(5.0), (), ()), ("stacked", weight[None], (0, 0, 0), (1, 1000, 900))]
    )
    seen: list[torch.Tensor] = []
    with CheckpointReader(tmp_path, once=way != "kept") as reader:
        if way == "hashed":
            reader.begin_hashing(["__0_0.distcp"])
        for rows in ((0, 700), (650, 1000), (699, 701), (3, 3)):
            seen.clear()
            part = reader.read("weight", rows=rows, see=lambda piece: seen.append(piece.clone()))
            assert torch.equal(part, weight[rows[0] : rows[1]])
            assert torch.equal(torch.cat([*seen, torch.empty(0)]), part.flatten())
        if way != "kept":
            reader.read("weight", rows=(0, 700), see=seen.append)
            assert len(seen) > 5, "shown while they are in the cache"
        seen.clear()
        assert reader.read("scalar", see=seen.append) == 5.0 and [piece.item() for piece in seen] == [5.0]
        seen.clear()
        target = torch.empty(1, 10, 900)
        reader.read_into("stacked", target, offsets=(0, 40, 0), see=lambda piece: seen.append(piece.clone()))
        assert torch.equal(torch.cat(seen), target.flatten()) and torch.equal(target[0], weight[40:50])


def test_some_rows_cost_the_memory_of_these_rows(tmp_path: Path) -> None:
    whole = torch.arange(24 << 20, dtype=torch.float32).view(-1, 1024)  # 96 MiB in one chunk
    stacked = whole.view(2, -1, 1024)
    odd = ("odd", torch.ones(3), (0,), (3,))  # what follows is aligned to nothing
    write_chunks(
        tmp_path,
        [odd, ("weight", whole, (0, 0), whole.shape), ("stacked", stacked, (0, 0, 0), stacked.shape)],
    )
    expected = whole[20_000:20_002].clone(), stacked[1, 20:22].clone()
    del whole, stacked
    # A process of its own: the peak of this one is that of every test before.
    program = (
        "import resource, sys, torch\n"
        "from megatron_xmtf.checkpoint.reader import CheckpointReader\n"
        "with CheckpointReader(sys.argv[1]) as reader:\n"
        "    reader.read('odd')\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    rows, layer = reader.read('weight', rows=(20_000, 20_002)), torch.empty(1, 2, 1024)\n"
        "    reader.read_into('stacked', layer, offsets=(1, 20, 0))\n"
        "    torch.save((rows, layer[0]), sys.argv[1] + '/rows.pt')\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert all(map(torch.equal, torch.load(tmp_path / "rows.pt"), expected))
    assert int(done.stdout) < 16 << 10, "KiB"


def test_numbers_that_do_not_lie_in_one_piece_are_read_whole(tmp_path: Path) -> None:
    turned = WEIGHT.t()
    with open(tmp_path / "chunk", "wb") as stream:
        torch.save(turned, stream)
    with open(tmp_path / "chunk", "rb") as stream:
        length = (tmp_path / "chunk").stat().st_size
        found = StoredChunk.find(stream, offset=0, length=length, what="chunk")
        assert found.shape == (6, 10) and found.offset is None
        with pytest.raises(CorruptCheckpointError, match="chunk is damaged"):
            StoredChunk.find(stream, offset=0, length=length - 7, what="chunk")


def test_torch_reads_the_same(checkpoint: Path) -> None:
    state = {"weight": torch.zeros(10, 6), "bias": torch.zeros(3, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert torch.equal(state["weight"], WEIGHT) and torch.equal(state["bias"], torch.ones(3, dtype=torch.bfloat16))


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    dcp.save({"weight": WEIGHT, "nested": {"step": 3}}, checkpoint_id=tmp_path, no_dist=True)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("weight"), WEIGHT) and reader.read_object("nested.step") == 3


def test_row_ranges_cover_once() -> None:
    assert list(row_ranges(0, 10)) == []
    assert list(row_ranges(3, 10, chunk_bytes=1)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("where", ["whole", "planner_data", "storage_meta", "all_local_plans"])
def test_a_crafted_metadata_does_not_run(checkpoint: Path, tmp_path: Path, where: str) -> None:
    canary = tmp_path / "canary"
    metadata = load_unsafe(checkpoint)
    if where != "whole":
        setattr(metadata, where, Payload(canary))
    store(checkpoint, Payload(canary) if where == "whole" else metadata)
    with pytest.raises(CorruptCheckpointError, match=r"Path\.touch|builtins.getattr|pathlib"):
        check_safe(checkpoint)
    assert not canary.exists()
    load_unsafe(checkpoint)  # the control: a plain pickle.load runs it
    assert canary.exists()


@pytest.mark.parametrize("name", ["os.system", "torch.load", "torch.nn.Module", "builtins.eval", "torch.os.system"])
def test_names_off_the_list_are_refused_by_name(checkpoint: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (checkpoint / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CorruptCheckpointError, match=name.replace(".", r"\.")):
        read_metadata(checkpoint)


def test_a_dotted_name_does_not_walk_out_of_an_allowed_module(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.")
    with pytest.raises(CorruptCheckpointError, match=r"torch\.os\.system"):
        read_metadata(checkpoint)


def test_a_huge_memo_index_costs_nothing(checkpoint: Path) -> None:
    # LONG_BINPUT with index 2^29 - 1: the unpickler in C would fill a table of that length.
    (checkpoint / ".metadata").write_bytes(b"]r\xff\xff\xff\x1f.")
    with pytest.raises(CorruptCheckpointError, match="holds a list"):
        read_metadata(checkpoint)


def test_a_class_is_not_changed(checkpoint: Path) -> None:
    name = Metadata.__module__.encode()
    crafted = b"\x80\x02c" + name + b"\nMetadata\nN}X\x07\x00\x00\x00versionK\x01s\x86b."
    (checkpoint / ".metadata").write_bytes(crafted)
    with pytest.raises(CorruptCheckpointError, match="changes the class Metadata"):
        read_metadata(checkpoint)
    assert Metadata.version is None


def test_a_crafted_common_file_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"step": Payload(canary)}, checkpoint / "common.pt")
    with pytest.raises(CorruptCheckpointError, match="common.pt is refused"):
        check_safe(checkpoint)
    assert not canary.exists()


def test_a_crafted_byte_object_does_not_run(tmp_path: Path) -> None:
    canary, directory = tmp_path / "canary", tmp_path / "checkpoint"
    dcp.save({"state": Payload(canary)}, checkpoint_id=directory, no_dist=True)
    torch.save({}, directory / "common.pt")
    with pytest.raises(CorruptCheckpointError, match="state is refused"):
        check_safe(directory)
    assert not canary.exists()


def set_path(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../outside.distcp"


def set_length(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("bias", (0,))].length = 1 << 40


def set_transform(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("bias", (0,))].transform_descriptors = ["stream.zstd"]


def drop_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("bias", (0,))]


def drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["weight"].chunks.pop()


def move_chunk(metadata: Metadata) -> None:
    chunk = ChunkStorageMetadata(torch.Size([2]), torch.Size([3]))
    metadata.state_dict_metadata["bias"].chunks[0] = chunk
    metadata.storage_data[MetadataIndex("bias", (2,))] = metadata.storage_data[MetadataIndex("bias", (0,))]


def wrong_type(metadata: Metadata) -> None:
    metadata.state_dict_metadata["bias"] = "a string"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (set_path, "leads outside"),
        (set_length, "said to be at bytes"),
        (set_transform, "stored through"),
        (drop_place, "stored nowhere"),
        (drop_chunk, "36 elements in all instead of 60"),
        (move_chunk, "outside of"),
        (wrong_type, "is a str"),
    ],
)
def test_metadata_that_does_not_describe_its_files(
    checkpoint: Path, alter: Callable[[Metadata], None], message: str
) -> None:
    metadata = load_unsafe(checkpoint)
    alter(metadata)
    store(checkpoint, metadata)
    with pytest.raises(CorruptCheckpointError, match=message):
        read_metadata(checkpoint)


def test_a_chunk_of_another_shape_is_refused(checkpoint: Path) -> None:
    metadata = load_unsafe(checkpoint)
    other = io.BytesIO()
    torch.save(torch.ones(5, dtype=torch.bfloat16), other)
    place = metadata.storage_data[MetadataIndex("bias", (0,))]
    with open(checkpoint / place.relative_path, "ab") as stream:
        place.offset, place.length = stream.tell(), len(other.getvalue())
        stream.write(other.getvalue())
    store(checkpoint, metadata)
    with CheckpointReader(checkpoint) as reader, pytest.raises(CorruptCheckpointError, match=r"\(5,\).*\(3,\)"):
        reader.read("bias")


def test_a_metadata_cut_anywhere(checkpoint: Path) -> None:
    data = (checkpoint / ".metadata").read_bytes()
    for keep in range(len(data)):
        (checkpoint / ".metadata").write_bytes(data[:keep])
        with pytest.raises(CorruptCheckpointError):
            read_metadata(checkpoint)


def test_random_damage_never_escapes_as_another_error(checkpoint: Path) -> None:
    data = (checkpoint / ".metadata").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        altered = bytearray(data)
        position = int(torch.randint(len(data), (), generator=generator))
        altered[position] = int(torch.randint(256, (), generator=generator))
        (checkpoint / ".metadata").write_bytes(altered)
        try:
            read_metadata(checkpoint)
        except CorruptCheckpointError:
            continue


def test_a_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        read_metadata(tmp_path)
