"""The tools with Megatron's spellings do what the verbs do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny import write_records, write_tiny_tokenizer

TOOLS = Path(__file__).parent.parent / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return directory


def preprocess(tokenizer: Path, prefix: Path, records: Path, *more: str) -> int:
    words = ["--input", str(records), "--output-prefix", str(prefix), "--tokenizer-name-or-path", str(tokenizer)]
    return load("preprocess_data").main([*words, *more])


def test_pairs_with_megatrons_flags_decode_to_the_records(tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: Megatron-Core's own reader, and the tokenizer's rule that a token is a byte."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    records = tmp_path / "records.jsonl"
    write_records(records, 5)
    flags = ("--json-keys", "inputs", "targets", "--append-eod", "--prepend-space", "--dataset-impl", "mmap")
    assert preprocess(tokenizer, tmp_path / "pairs", records, *flags) == 0
    written = [json.loads(line) for line in records.read_text().splitlines()]
    inputs = IndexedDataset(str(tmp_path / "pairs_inputs_document"))
    targets = IndexedDataset(str(tmp_path / "pairs_targets_document"))
    assert [len(ids) for ids in inputs] == [len(record["inputs"]) for record in written]
    assert [len(ids) for ids in targets] == [1 + len(record["targets"]) + 1 for record in written]
    assert all(ids[-1] == 2 for ids in targets)


def test_other_keys_and_no_space(tokenizer: Path, tmp_path: Path) -> None:
    records = tmp_path / "questions.jsonl"
    records.write_text('{"question": "ab", "answer": "cde"}\n')
    assert preprocess(tokenizer, tmp_path / "qa", records, "--json-keys", "question", "answer", "--append-eod") == 0
    manifest = json.loads((tmp_path / "qa.json").read_text())
    assert manifest["tokens"] == {"inputs": 2, "targets": 4}


def test_one_key_is_text(tokenizer: Path, tmp_path: Path) -> None:
    records = tmp_path / "texts.jsonl"
    records.write_text('{"content": "abc"}\n')
    assert preprocess(tokenizer, tmp_path / "texts", records, "--json-keys", "content", "--append-eod") == 0
    assert (tmp_path / "texts_text_document.idx").is_file()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--json-keys", "inputs", "--append-eod"), "together"),
        (("--json-keys", "inputs", "targets"), "--append-eod"),
        (("--json-keys", "text", "--append-eod", "--prepend-space"), "--prepend-space is for targets"),
    ],
)
def test_what_would_differ_from_megatron_is_refused(
    flags: tuple[str, ...], reason: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        preprocess(tokenizer, tmp_path / "p", tmp_path / "absent.jsonl", *flags)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_merge_of_a_directory_and_of_prefixes_are_equal(tokenizer: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, name in enumerate(("a", "b")):
        write_records(tmp_path / f"{name}.jsonl", 3 + number, seed=number)
        flags = ("--json-keys", "inputs", "targets", "--append-eod", "--prepend-space")
        assert preprocess(tokenizer, parts / name, tmp_path / f"{name}.jsonl", *flags) == 0
    merge = load("merge_datasets").main
    assert merge(["--input", str(parts), "--output-prefix", str(tmp_path / "m")]) == 0
    assert merge(["--datasets", str(parts / "a"), str(parts / "b"), "--output-prefix", str(tmp_path / "n")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["num_examples"] == 7
    for half in ("inputs", "targets"):
        for kind in ("bin", "idx"):
            name = f"_{half}_document.{kind}"
            assert (tmp_path / f"m{name}").read_bytes() == (tmp_path / f"n{name}").read_bytes()
    with pytest.raises(SystemExit):
        merge(["--input", str(tokenizer), "--output-prefix", str(tmp_path / "o")])


def test_conversion_there_and_back_keeps_every_byte(tiny_hf: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert = load("convert_checkpoint").main
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    assert (
        convert(["--loader", "hf", "--saver", "core", "--load-dir", str(tiny_hf), "--save-dir", str(checkpoint)]) == 0
    )
    assert convert(["--loader", "core", "--saver", "hf", "--load-dir", str(checkpoint), "--save-dir", str(back)]) == 0
    before, after = load_file(tiny_hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    half = [
        "--loader",
        "hf",
        "--saver",
        "core",
        "--bf16",
        "--load-dir",
        str(tiny_hf),
        "--save-dir",
        str(tmp_path / "h"),
    ]
    assert convert(half) == 0
    assert json.loads((tmp_path / "h" / "manifest.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(SystemExit):
        convert(["--loader", "hf", "--saver", "hf", "--load-dir", str(tiny_hf), "--save-dir", str(tmp_path / "x")])


@pytest.mark.parametrize("tool", ["preprocess_data", "merge_datasets", "convert_checkpoint"])
def test_runs_as_a_script(tool: str) -> None:
    shown = subprocess.run([sys.executable, TOOLS / f"{tool}.py", "--help"], capture_output=True, text=True, check=True)
    assert "Megatron" in shown.stdout
