import hashlib
import json

import numpy as np
import pytest

from megatron_xmtf.data import packing_index
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.errors import DatasetError, DiskFullError
from tests.data.memory_dataset import random_dataset


def statistics(rows, names):
    return {"rows": rows, "datasets": [{"name": name} for name in names]}


def make_index(key="a" * 64, *, example_type=np.uint32):
    """Rows of 2, 3 and 1 segments of two datasets."""
    return PackingIndex(
        row_offsets=np.array([0, 2, 5, 6]),
        dataset_ids=np.array([0, 1, 0, 0, 1, 1], np.uint16),
        example_ids=np.array([7, 2, 3, 9, 2, 0], example_type),
        row_lengths=31,
        long_examples="drop",
        statistics=statistics(3, ["a", "b"]),
        key=key,
        key_inputs={"seed": 3},
    )


@pytest.fixture
def directory(tmp_path):
    make_index().save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("example_type", [np.uint32, np.int64])
def test_what_is_saved_is_loaded(tmp_path, verify, example_type):
    index = make_index(example_type=example_type)
    index.save(tmp_path / "index")
    loaded = PackingIndex.load(tmp_path / "index", key=index.key, verify=verify)
    for name in ("row_offsets", "dataset_ids", "example_ids"):
        before, after = getattr(index, name), getattr(loaded, name)
        assert isinstance(after, np.memmap) and after.dtype == before.dtype and np.array_equal(before, after)
    for name in ("sequence_length", "long_examples", "statistics", "key", "key_inputs", "required_examples"):
        assert getattr(index, name) == getattr(loaded, name)
    assert loaded.required_examples == [10, 3] and len(loaded) == 3


def test_the_same_index_is_the_same_bytes(tmp_path):
    for place in ("one", "two"):
        make_index().save(tmp_path / place)
    files = [{path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} for place in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 4


@pytest.mark.parametrize("block", [1, 2, 4, 100])
def test_checks_by_blocks_see_every_entry(monkeypatch, tmp_path, block):
    monkeypatch.setattr(packing_index, "BLOCK", block)
    index = make_index()
    assert index.required_examples == [10, 3]
    index.save(tmp_path / "index")
    PackingIndex.load(tmp_path / "index")


def test_a_dataset_that_is_not_in_the_index_needs_no_examples():
    index = PackingIndex(
        row_offsets=np.array([0, 1]),
        dataset_ids=np.array([1], np.uint16),
        example_ids=np.array([4], np.uint32),
        row_lengths=31,
        long_examples="drop",
        statistics=statistics(1, ["a", "b", "c"]),
        key="",
        key_inputs={},
    )
    assert index.required_examples == [0, 5, 0]


def test_a_dataset_with_fewer_examples_is_refused_without_reading_the_index(directory):
    datasets = [random_dataset("a", 10, seed=1), random_dataset("b", 3, seed=2)]
    PackedRows(datasets, PackingIndex.load(directory, verify=False), pad_id=0)
    datasets[0] = random_dataset("a", 9, seed=1)
    with pytest.raises(DatasetError, match="example 9 of dataset 'a', which has 9 examples"):
        PackedRows(datasets, PackingIndex.load(directory, verify=False), pad_id=0)


# Damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-11] ^= 1
    path.write_bytes(content)


def edit(**changes):
    def change(path):
        manifest = json.loads(path.read_text())
        for name, value in changes.items():
            if value is None:
                del manifest[name]
            else:
                manifest[name] = value
        path.write_text(json.dumps(manifest))

    return change


STRUCTURAL = [
    ("example_ids.npy", truncate, "bytes instead of"),
    ("dataset_ids.npy", lambda path: path.unlink(), "dataset_ids.npy is missing"),
    ("packing.json", lambda path: path.write_text("{"), "not valid JSON"),
    ("packing.json", lambda path: path.write_text("{}"), "not that of a packing index"),
    ("packing.json", lambda path: path.unlink(), "does not exist"),
    ("packing.json", edit(statistics=statistics(4, "ab")), "3 rows, 4 in packing.json"),
    ("packing.json", edit(statistics={}), "no statistics"),
    ("packing.json", edit(files=None), "has no files"),
    ("packing.json", edit(required_examples=None), "has no required_examples"),
    ("packing.json", edit(required_examples=[1]), "required_examples of 1 datasets, statistics of 2"),
    ("packing.json", edit(required_examples=["x", 1]), "no numbers in required_examples"),
    ("packing.json", edit(version=1), "has version 1, this program reads 2.*xmtf pack CONFIG"),
    ("packing.json", edit(key="b" * 64), "its key is b"),
]
CONTENTS = [
    ("row_offsets.npy", flip_a_bit, "altered"),
    ("example_ids.npy", flip_a_bit, "altered"),
    ("packing.json", edit(required_examples=[10, 4]), "largest example numbers"),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("name", "damage", "message"), STRUCTURAL)
def test_a_damaged_index_is_refused_whether_verified_or_not(directory, name, damage, message, verify):
    PackingIndex.load(directory, key="a" * 64, verify=verify)
    damage(directory / name)
    with pytest.raises(DatasetError, match=message):
        PackingIndex.load(directory, key="a" * 64, verify=verify)


@pytest.mark.parametrize(("name", "damage", "message"), CONTENTS)
def test_altered_contents_are_seen_when_verified(directory, name, damage, message):
    damage(directory / name)
    PackingIndex.load(directory, verify=False)
    with pytest.raises(DatasetError, match=message):
        PackingIndex.load(directory)


def replace_array(directory, name, array):
    """Put in another array with hash and size to match, as only a writer with a defect would."""
    path = directory / f"{name}.npy"
    np.save(path, array, allow_pickle=True)
    content = path.read_bytes()
    manifest = json.loads((directory / "packing.json").read_text())
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "packing.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("row_offsets", np.array([0, 2, 2, 6]), "do not ascend"),
        ("row_offsets", np.array([1, 2, 5, 6]), "do not ascend"),
        ("row_offsets", np.array([0, 2, 5, 7]), "7 segments, 6 dataset"),
        ("row_offsets", np.array([0, 2, 5, 6], np.int32), "is int32"),
        ("dataset_ids", np.array([0, 1, 0, 0, 2, 1], np.uint16), "of no dataset"),
        ("example_ids", np.array([7, 2, 3, -9, 2, 0]), "of no example"),
        ("example_ids", np.array([7, 2, 3, 8, 2, 0], np.uint32), "largest example numbers"),
        ("example_ids", np.array([[7, 2, 3, 9, 2, 0]], np.uint32), r"uint32 \[1, 6\], not one row of uint32 or int64"),
        ("example_ids", np.array([print], dtype=object), "cannot be read"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(directory, name, array, message):
    replace_array(directory, name, array)
    with pytest.raises(DatasetError, match=message):
        PackingIndex.load(directory)


def test_the_first_of_two_builders_is_kept(tmp_path, monkeypatch):
    first, second = make_index("a" * 64), make_index("b" * 64)
    write = PackingIndex._write

    def write_while_another_finishes(self, directory):
        if self is second:
            first.save(tmp_path / "index")
        write(self, directory)

    monkeypatch.setattr(PackingIndex, "_write", write_while_another_finishes)
    second.save(tmp_path / "index")
    assert PackingIndex.load(tmp_path / "index").key == first.key
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, directory):
        (directory / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackingIndex, "_write", fail)
    with pytest.raises(DiskFullError):
        make_index().save(tmp_path / "index")
    assert not list(tmp_path.iterdir())
