"""Hugging Face datasets: saved ones against the library's own reading, directories of files, the hub without a net."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.errors import ConfigError, MissingError, RecordError
from megatron_xmtf.prompts import RowReport, Source, read_rows

datasets = pytest.importorskip("datasets")

ROWS = [
    {"id": number, "text": f"t\u00fc {number}", "label": number % 2, "answers": {"text": [str(number)] * (number % 3)}}
    for number in range(2500)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: a dataset of one split in two files; `dict`: two splits; `files`: parquet files named as on the hub."""
    root = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "answers": {"text": datasets.List(datasets.Value("string"))},
        }
    )
    whole = datasets.Dataset.from_list(ROWS, features=features)
    # select and shuffle leave an index of rows beside the table: saving must have applied it.
    whole.shuffle(seed=3).save_to_disk(root / "one", num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select(range(7))).save_to_disk(root / "dict")
    (root / "files" / "data").mkdir(parents=True)
    whole.to_parquet(root / "files" / "data" / "train-00000-of-00001.parquet")
    whole.select(range(7)).to_parquet(root / "files" / "data" / "test-00000-of-00001.parquet")
    return root


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return list(read_rows(Source(path, format="huggingface", **options)))


def test_saved_datasets_as_the_library_reads_them(saved: Path) -> None:
    oracle = list(datasets.load_from_disk(str(saved / "one")))
    assert oracle != ROWS and sorted(oracle, key=lambda row: row["id"]) == ROWS
    consumed: list[int] = []
    source = Source(saved / "one", format="huggingface")
    assert list(read_rows(source, on_bytes=consumed.append)) == oracle
    files = sum(path.stat().st_size for path in (saved / "one").glob("*.arrow"))
    assert 0.9 * files <= sum(consumed) <= files and len(consumed) >= 2
    assert read(saved / "dict", split="test") == ROWS[:7]
    assert read(saved / "dict", split="train") == ROWS
    assert read(saved / "dict" / "test") == ROWS[:7]
    columns = ("text", "answers")
    assert read(saved / "dict", split="test", columns=columns, fields={"all": "answers.text"})[4] == {
        "text": "t\u00fc 4",
        "answers": {"text": ["4"]},
        "all": ["4"],
    }


def test_splits_are_declared(saved: Path) -> None:
    for name in ("dict", "files"):
        with pytest.raises(ConfigError, match="has the splits (train, test|test, train); declare split"):
            read(saved / name)
        with pytest.raises(ConfigError, match="has no split 'tset'; nearest: test"):
            read(saved / name, split="tset")
    with pytest.raises(ConfigError, match="holds the split None, not 'train'"):
        read(saved / "one", split="train")
    with pytest.raises(ConfigError, match="has no configurations; drop name"):
        read(saved / "dict", split="test", name="en")


def test_a_directory_of_data_files(saved: Path, tmp_path: Path) -> None:
    assert read(saved / "files", split="train") == ROWS
    assert read(saved / "files", split="test", columns=("id",)) == [{"id": number} for number in range(7)]
    head = "---\nconfigs:\n- config_name: sw\n  data_files:\n  - split: train\n    path: sw/*.jsonl\n---\n# Text\n"
    (tmp_path / "README.md").write_text(head)
    (tmp_path / "sw").mkdir()
    (tmp_path / "sw" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    assert read(tmp_path, name="sw", split="train") == ROWS[:5]
    assert read(tmp_path) == ROWS[:5]
    with pytest.raises(ConfigError, match="cannot be opened: ValueError: BuilderConfig 'xx' not found"):
        read(tmp_path, name="xx")
    (tmp_path / "sw" / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(RecordError, match="cannot be read on"):
        read(tmp_path)


def test_a_dataset_reads_no_file_but_its_own(saved: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a password\n")
    directory = tmp_path / "dataset"
    directory.mkdir()
    for pattern in (str(secret), "../secret.txt", "https://example.org/a.jsonl", "hf://datasets/a/b/c.txt"):
        for name, form in (("README.md", "---\n{}---\n"), (".huggingface.yaml", "{}")):
            head = (
                f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {json.dumps(pattern)}\n"
            )
            (directory / name).write_text(form.format(head))
            with pytest.raises(ConfigError, match="outside of the dataset; it is not read"):
                read(directory)
            (directory / name).unlink()
    (directory / "train.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match="outside of it; it is not read"):
        read(directory)
    copy = tmp_path / "copy"
    shutil.copytree(saved / "dict" / "test", copy)
    state = json.loads((copy / "state.json").read_text())
    for name in ("../secret.txt", str(secret)):
        (copy / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
        with pytest.raises(ConfigError, match="may not leave|leads outside"):
            read(copy)
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["../copy"]}))
    with pytest.raises(ConfigError, match="leads outside"):
        read(splits)


def test_no_code_of_a_dataset_runs(tmp_path: Path) -> None:
    directory = tmp_path / "dataset"
    directory.mkdir()
    marker = tmp_path / "ran"
    (directory / "dataset.py").write_text(f"open({str(marker)!r}, 'w')\nimport datasets\n")
    with pytest.raises(ConfigError, match="cannot be opened"):
        read(directory)
    assert not marker.exists()
    (directory / "dataset.py").unlink()
    for name, reader in (("image.png", "imagefolder"), ("shard.tar", "webdataset"), ("a.xml", "xml")):
        (directory / name).write_bytes(b"x")
        with pytest.raises(ConfigError, match=f"needs the reader '{reader}' of `datasets`; only arrow, csv"):
            read(directory)
        (directory / name).unlink()


def test_damaged_saved_datasets(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved / "dict" / "train", copy)
    (file,) = copy.glob("*.arrow")
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b'{"a": 1}\n' * 100):
        file.write_bytes(content)
        with pytest.raises(RecordError, match="is no Arrow stream, or is damaged or cut off"):
            list(read_rows(Source(copy, format="huggingface"), on_bad_row="skip", report=RowReport()))
    file.unlink()
    with pytest.raises(MissingError, match="does not exist"):
        read(copy)
    (copy / "state.json").write_text("[]")
    with pytest.raises(RecordError, match="holds a list"):
        read(copy)
    with pytest.raises(MissingError, match="is a file, not a directory"):
        read(copy / "state.json")


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests run with HF_HUB_OFFLINE=1 (conftest.py)."""
    with pytest.raises(ConfigError) as caught:
        list(read_rows(Source(hub="bigscience/xP3", name="sw", split="train", revision="main")))
    message = str(caught.value)
    assert "bigscience/xP3 cannot be opened" in message and "HF_HUB_OFFLINE is set" in message
    assert "hf download --repo-type dataset bigscience/xP3" in message
    for wrong in ("json", "a/b/c", "../a", "https://x.y/z"):
        with pytest.raises(ConfigError, match="is not of the form owner/name"):
            list(read_rows(Source(hub=wrong)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigscience" / "xP3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is also a path here"):
        list(read_rows(Source(hub="bigscience/xP3")))
