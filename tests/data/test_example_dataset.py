"""What is opened is whole, consistent, and made with the model's tokenizer; merging is exact."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_xmtf.cli import main
from megatron_xmtf.data.dataset_manifest import length_statistics
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.indexed_writer import IndexedDatasetWriter
from megatron_xmtf.data.merge import merge_datasets
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, DatasetError, RecordError, TokenizerError
from tests.data.conftest import make_tokenizer

RECORDS = [
    {"inputs": "How many months?", "targets": "twelve", "language": "en", "dataset": "cldr", "task": "count"},
    {"inputs": "miezi mingapi?", "targets": "kumi na miwili", "language": "sw", "dataset": "cldr"},
    {"inputs": "几个月？", "targets": "十二", "language": "zh", "dataset": "other"},
    {"inputs": "How many?", "targets": "seven", "language": "en"},
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def prefix(tmp_path: Path, tokenizer_directory: Path) -> Path:
    source = write_jsonl(tmp_path / "r.jsonl", RECORDS)
    preprocess([source], tokenizer=tokenizer_directory, output_prefix=tmp_path / "d" / "train", show_progress=False)
    return tmp_path / "d" / "train"


def file_of(prefix: Path, name: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{name}")


def edit_manifest(prefix: Path, **changes: object) -> None:
    path = prefix.with_name(prefix.name + ".json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


def test_examples_and_columns(prefix: Path, tokenizer_directory: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_directory)
    dataset = ExampleDataset.open(prefix, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, deep=True)
    assert (len(dataset), dataset.kind, dataset.name) == (4, "pairs", "train")
    for index, record in enumerate(RECORDS):
        inputs, targets = dataset[index]
        assert inputs.dtype == targets.dtype == np.int32
        assert tokenizer.decode(inputs) == record["inputs"]
        assert tokenizer.decode(targets) == f" {record['targets']}</s>"
        assert (len(inputs), len(targets)) == (dataset.input_lengths[index], dataset.target_lengths[index])
    assert dataset.column_names == ["dataset", "language", "task"]
    for name in dataset.column_names:
        values, names = dataset.column(name), dataset.names(name)
        assert values is not None and values.dtype == np.uint8
        assert [names[value] for value in values] == [record.get(name, "") for record in RECORDS]
    assert dataset.column("template") is None and dataset.names("template") == []


def test_records_of_one_source_row_have_one_document(tmp_path: Path, tokenizer_directory: Path) -> None:
    rows = [
        {"inputs": "a", "targets": "b"},
        {"inputs": "a", "targets": "c", "template": "t"},
        {"inputs": "x", "targets": "b", "id": 3, "dataset": "d", "template": "t", "template_language": "en"},
        {"inputs": "y", "targets": "b", "id": "3", "dataset": "d", "template": "u", "config": "c", "split": "train"},
        {"inputs": "z", "targets": "b", "id": "3", "dataset": "e"},
        {"inputs": "z", "targets": "b", "id": "en-7", "dataset": "en", "document": "7"},
        {"inputs": "w", "targets": "b", "id": "sw-7", "dataset": "sw", "document": "7"},
    ]
    names = ["a", "a", "d\x003", "d\x003", "e\x003", "\0doc\x007", "\0doc\x007"]
    expected = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in names]
    source = write_jsonl(tmp_path / "r.jsonl", rows)
    preprocess([source], tokenizer=tokenizer_directory, output_prefix=tmp_path / "p", show_progress=False)
    dataset = ExampleDataset.open(tmp_path / "p", deep=True)
    assert dataset.documents is not None and dataset.documents.dtype == np.uint64
    assert dataset.documents.tolist() == expected
    for name in ("config", "split", "template_language"):
        values = dataset.column(name)
        assert values is not None
        assert [dataset.names(name)[value] for value in values] == [row.get(name, "") for row in rows]

    text = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b", "id": 3, "dataset": "d"}])
    preprocess([text], tokenizer=tokenizer_directory, output_prefix=tmp_path / "t", kind="text", show_progress=False)
    documents = ExampleDataset.open(tmp_path / "t").documents
    assert documents is not None and documents.tolist() == [expected[0], expected[2]]

    for value in (True, 1.5, [3], {}):
        bad = write_jsonl(tmp_path / "bad.jsonl", [{**rows[0], "id": value}])
        with pytest.raises(RecordError, match="field 'id' is"):
            preprocess([bad], tokenizer=tokenizer_directory, output_prefix=tmp_path / "q", show_progress=False)


@pytest.mark.parametrize("half", ["inputs_document", "targets_document"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_missing_and_altered_files(prefix: Path, half: str, suffix: str) -> None:
    path = file_of(prefix, half + suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DatasetError, match=rf"{path.name} is {len(whole) - 2} bytes, but train.json says {len(whole)}"):
        ExampleDataset.open(prefix)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path.name} is missing"):
        ExampleDataset.open(prefix)
    if suffix == ".bin":  # one flipped bit is found by reading everything, not by opening
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        ExampleDataset.open(prefix)
        with pytest.raises(DatasetError, match=f"{path.name} was altered"):
            ExampleDataset.open(prefix, deep=True)


def test_halves_out_of_step_without_manifest(tmp_path: Path) -> None:
    for half, count in (("inputs", 3), ("targets", 2)):
        with IndexedDatasetWriter(tmp_path / f"d_{half}_document", dtype=np.dtype(np.int32)) as writer:
            writer.add(np.arange(count), np.ones(count, np.int64))
    with pytest.raises(DatasetError, match="3 inputs but 2 targets"):
        ExampleDataset.open(tmp_path / "d")


def test_published_dataset_opens_with_a_warning(
    tmp_path: Path, tokenizer_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for half, tokens in (("inputs", [[5, 6], [7]]), ("targets", [[8, 2], [900, 2]])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"xp3_{half}_document.bin"), dtype=np.int32)
        for one in tokens:
            builder.add_document(np.array(one), [len(one)])
        builder.finalize(str(tmp_path / f"xp3_{half}_document.idx"))
    with caplog.at_level(logging.WARNING):
        dataset = ExampleDataset.open(tmp_path / "xp3", tokenizer=Tokenizer.load(tokenizer_directory))
    assert "cannot be checked" in caplog.text
    assert [list(map(list, dataset[i])) for i in range(2)] == [[[5, 6], [8, 2]], [[7], [900, 2]]]
    assert dataset.manifest is None and dataset.column_names == []
    with pytest.raises(DatasetError, match=r"token id 900 of example 1 is outside the vocabulary of 600"):
        ExampleDataset.open(tmp_path / "xp3", vocab_size=600, deep=True)


def test_wrong_tokenizer_is_refused(prefix: Path, tokenizer_directory: Path, tmp_path: Path) -> None:
    other = Tokenizer.load(make_tokenizer(tmp_path / "other", vocab_size=300))
    with pytest.raises(TokenizerError, match="the same ids mean other text"):
        ExampleDataset.open(prefix, tokenizer=other)
    with pytest.raises(TokenizerError, match="the model has 100"):
        ExampleDataset.open(prefix, vocab_size=100)
    info = json.loads(prefix.with_name("train.json").read_text(encoding="utf-8"))["tokenizer"]
    edit_manifest(prefix, tokenizer={**info, "eos_id": 1})
    with pytest.raises(TokenizerError, match="end with id 1"):
        ExampleDataset.open(prefix, tokenizer=Tokenizer.load(tokenizer_directory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not the manifest of a dataset"),
        ({"format_version": 2}, "format version is 2"),
        ({"kind": ["pairs"]}, "kind"),
        ({"num_examples": 5}, "announces 5 examples, the files hold 4"),
        ({"tokenizer": {"fingerprint": 3}}, "tokenizer lacks"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "its files are not"),
        ({"columns": {"../x": {"names": []}}}, "columns do not have names"),
    ],
)
def test_altered_manifest_is_refused(prefix: Path, changes: dict, message: str) -> None:
    edit_manifest(prefix, **changes)
    with pytest.raises(DatasetError, match=message):
        ExampleDataset.open(prefix)


def test_nothing_or_both_kinds_at_the_prefix(prefix: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset at"):
        ExampleDataset.open(prefix.with_name("nothing"))
    prefix.with_name("train.json").unlink()
    file_of(prefix, "text_document.idx").write_bytes(file_of(prefix, "inputs_document.idx").read_bytes())
    with pytest.raises(DatasetError, match="both pairs and text"):
        ExampleDataset.open(prefix)


def test_damaged_columns_are_refused(prefix: Path) -> None:
    path = file_of(prefix, "columns.npz")
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="columns.npz"):
        ExampleDataset.open(prefix).column("dataset")


def test_columns_that_are_pickles_are_never_read(prefix: Path) -> None:
    path = file_of(prefix, "columns.npz")
    with path.open("wb") as stream:
        np.savez(stream, dataset=np.array([{}] * 4, object))
    files = json.loads(prefix.with_name("train.json").read_text(encoding="utf-8"))["files"]
    edit_manifest(prefix, files={**files, "columns.npz": {"bytes": path.stat().st_size, "sha256": ""}})
    with pytest.raises(DatasetError, match="object"):
        ExampleDataset.open(prefix).column("dataset")


def test_merge_is_an_exact_concatenation(tmp_path: Path, tokenizer_directory: Path) -> None:
    parts = [RECORDS[:1], RECORDS[1:3], [{"inputs": "x", "targets": "y"}]]
    prefixes = []
    for number, part in enumerate(parts):
        source = write_jsonl(tmp_path / f"{number}.jsonl", part)
        prefixes.append(tmp_path / f"part{number}")
        preprocess([source], tokenizer=tokenizer_directory, output_prefix=prefixes[-1], show_progress=False)
    whole = write_jsonl(tmp_path / "all.jsonl", sum(parts, []))
    preprocess([whole], tokenizer=tokenizer_directory, output_prefix=tmp_path / "whole", show_progress=False)
    manifest = merge_datasets(prefixes, output_prefix=tmp_path / "merged", show_progress=False)
    for name in ("inputs_document.bin", "inputs_document.idx", "targets_document.bin", "targets_document.idx"):
        assert file_of(tmp_path / "merged", name).read_bytes() == file_of(tmp_path / "whole", name).read_bytes()
    merged, reference = ExampleDataset.open(tmp_path / "merged", deep=True), ExampleDataset.open(tmp_path / "whole")
    assert merged.column_names == reference.column_names
    for name in reference.column_names:
        assert merged.names(name) == reference.names(name)
        assert np.array_equal(merged.column(name), reference.column(name))
    assert np.array_equal(merged.documents, reference.documents) and merged.documents is not None
    assert manifest["counts"] == reference.manifest["counts"]
    assert manifest["lengths"] == reference.manifest["lengths"]


def test_merge_keeps_documents_of_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published text with several sequences a document: equal to Megatron's own `add_index`, in small blocks too."""
    monkeypatch.setattr("megatron_xmtf.data.merge.BLOCK_TOKENS", 3)
    for name, documents in (("a", [[2, 3], [1], [0, 2]]), ("b", [[4], [1, 1, 1]])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}_text_document.bin"), dtype=np.uint16)
        for lengths in documents:
            builder.add_document(np.arange(sum(lengths)), lengths)
        builder.finalize(str(tmp_path / f"{name}_text_document.idx"))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in "ab":
        builder.add_index(str(tmp_path / f"{name}_text_document"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets([tmp_path / "a", tmp_path / "b"], output_prefix=tmp_path / "ours", show_progress=False)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours_text_document{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert ExampleDataset.open(tmp_path / "ours").tokenizer_info is None
    assert ExampleDataset.open(tmp_path / "ours").documents is None


def test_merge_keeps_documents_only_where_all_have_them(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = prefix.with_name("old")
    for path in list(prefix.parent.iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("train", "old")))
    arrays = dict(np.load(file_of(prefix, "columns.npz")))
    del arrays["document"]
    np.savez_compressed(file_of(old, "columns.npz"), **arrays)  # as another program may have packed them
    entry = {"bytes": file_of(old, "columns.npz").stat().st_size, "sha256": ""}
    manifest = json.loads(old.with_name("old.json").read_text())
    del manifest["documents"]
    edit_manifest(old, documents=False, files={**manifest["files"], "columns.npz": entry})
    assert ExampleDataset.open(old).documents is None
    assert main(["merge", "--input", str(prefix), str(old), "--output-prefix", str(tmp_path / "m")]) == 0
    assert f"without documents, as 1 of the inputs are: {old}" in capsys.readouterr().out
    merged = ExampleDataset.open(tmp_path / "m", deep=True)
    assert merged.documents is None and merged.column("language") is not None


def test_merge_refuses_what_differs(prefix: Path, tokenizer_directory: Path, tmp_path: Path) -> None:
    def make(name: str, **options: object) -> Path:
        source = write_jsonl(tmp_path / f"{name}.jsonl", [{**RECORDS[0], "text": "a text"}])
        options = {"tokenizer": tokenizer_directory, **options}
        preprocess([source], output_prefix=tmp_path / name, show_progress=False, **options)
        return tmp_path / name

    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    for name, options, message in (
        ("text", {"kind": "text"}, "kind differs, pairs and text"),
        ("tokenizer", {"tokenizer": other}, "tokenizer differs"),
        ("space", {"target_prefix": ""}, "target prefix differs"),
    ):
        with pytest.raises(DatasetError, match=message):
            merge_datasets([prefix, make(name, **options)], output_prefix=tmp_path / "m", show_progress=False)
    with pytest.raises(ConfigError, match="input of the merge as well"):
        merge_datasets([prefix], output_prefix=prefix, show_progress=False)
    assert not list(tmp_path.glob("m*_document*")) and not list(tmp_path.glob("m.*"))


def test_length_statistics_by_hand() -> None:
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 100], np.int32)
    found = length_statistics(lengths)
    assert (found["min"], found["p50"], found["p90"], found["p99"], found["max"]) == (1, 5, 9, 100, 100)
    assert found["mean"] == 14.5
    assert found["histogram"] == {"1": 1, "2": 1, "4": 2, "8": 4, "16": 1, "128": 1}
    assert length_statistics(np.empty(0, np.int32))["max"] == 0
