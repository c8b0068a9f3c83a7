"""`xmtf inspect --show`: what is marked is what `build_batch` weighs, in examples and in packed rows."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.data.tokenizer import Tokenizer
from tests.planning.tiny_mixture import run_config, write_dataset, write_mixture
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def prefixes(directory: Path) -> list[str]:
    return write_mixture(directory)


@pytest.fixture
def config(directory: Path, tmp_path: Path, prefixes: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    values = run_config(
        tmp_path,
        prefixes,
        loss={"normalization": "target_sequence_per_micro_batch"},
        data={"train": [{"prefix": prefix} for prefix in prefixes], "long_examples": "truncate_inputs_left"},
    ).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["pack", str(tmp_path / "train.yaml")]) == 0
    capsys.readouterr()
    return str(tmp_path / "train.yaml")


def inspect(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["inspect", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def index_of(config: str) -> Path:
    (found,) = (Path(config).parent / "run" / "packing").iterdir()
    return found


def rows_of(config: str, directory: Path) -> PackedRows:
    datasets = open_datasets(load_config(config).data.training_datasets)
    return PackedRows(datasets, PackingIndex.load(index_of(config)), pad_id=3)


def test_rows_are_those_of_training_with_its_weights(
    config: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = directory / "tokenizer"
    report = json.loads(inspect(capsys, config, "--show", 9, "--row", 3, "--tokenizer", tokenizer, "--json"))
    rows = rows_of(config, directory)
    assert [shown["row"] for shown in report["rows"]] == list(range(3, 12))
    cut = 0
    for shown in report["rows"]:
        number = shown["row"]
        first = number // 2 * 2
        batch = build_batch([rows[first], rows[first + 1]], normalization="target_sequence_per_micro_batch")
        row = rows[number]
        tokens = [token for segment in shown["segments"] for token in segment["ids"]]
        assert tokens == row.tokens[row.segment_ids > 0].tolist()
        assert shown["tokens"] + shown["padding"] == shown["capacity"] == 33
        weights = [weight for segment in shown["segments"] for weight in segment["loss_weights"]]
        expected = np.zeros(33, np.float32)
        expected[1:] = batch.loss_weights[number - first].numpy()
        assert weights == pytest.approx(expected[: len(weights)].tolist())
        assert sum(weights) > 0
        for place, segment in enumerate(shown["segments"]):
            assert segment["example"] == row.example_ids[place]
            inputs, targets = rows.datasets[int(row.dataset_ids[place])][segment["example"]]
            kept = segment["num_inputs"]
            assert segment["ids"] == [*inputs.tolist()[len(inputs) - kept :], *targets.tolist()]
            assert segment["cut_inputs"] == len(inputs) - kept
            assert "".join(segment["text"]) == Tokenizer.load(tokenizer).decode(segment["ids"])
            cut += segment["cut_inputs"]
    everything = json.loads(inspect(capsys, config, "--show", 60, "--json"))
    cut = sum(segment["cut_inputs"] for row in everything["rows"] for segment in row["segments"])
    assert cut > 0, "some inputs are truncated"


def test_marks_of_a_row_are_its_loss_weights(config: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    text = inspect(capsys, config, "--show", 1, "--row", 5, "--tokenizer", directory / "tokenizer")
    row = rows_of(config, directory)[5]
    batch = build_batch([row], normalization="target_token")
    marked = "".join(re.findall(r"\[\[(.*?)\]\]", text)).replace("│", "")
    labels = batch.labels[0][batch.loss_weights[0] > 0].tolist()
    assert marked == tokenizer.decode(labels).replace(" ", "·")
    assert f"{len(labels)} of them with loss" in text
    assert "loss weight 0." in text and "row 5: " in text


def test_an_index_with_its_datasets(
    config: str, directory: Path, prefixes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index = index_of(config)
    text = inspect(capsys, index, "--show", 2, "--data", *prefixes, "--tokenizer", directory / "tokenizer")
    assert "row 0: " in text and "row 1: " in text and "</s>]]" in text and "loss weight" not in text
    numbers = inspect(capsys, index, "--show", 1, "--data", *prefixes)
    first = rows_of(config, directory)[0].tokens.tolist()
    assert str(first[0]) in numbers and "give --tokenizer DIR" in numbers
    assert "needs --data with the prefixes of its 2 datasets" in inspect(capsys, index, "--show", 1, code=2)
    assert "--data names 1 datasets, the index has 2: qa, topics" in inspect(
        capsys, index, "--show", 1, "--data", prefixes[0], code=2
    )
    message = inspect(capsys, index, "--show", 1, "--data", *reversed(prefixes), code=2)
    assert "is not the dataset 'qa' that the index was built from" in message
    assert "the index has" in inspect(capsys, config, "--show", 1, "--row", 10**6, code=2)


def test_examples_of_a_dataset(directory: Path, prefixes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [prefixes[0], "--show", 3, "--start", 7, "--tokenizer", directory / "tokenizer"]
    report = json.loads(inspect(capsys, *words, "--json"))
    for example in report["examples"]:
        assert not any(example["inputs_has_loss"]) and all(example["targets_has_loss"])
        assert len(example["inputs_ids"]) == len(example["inputs_has_loss"])
    text = inspect(capsys, *words)
    shown = [line for line in text.split("example 7")[1].splitlines() if line.startswith(("  inputs", "  targets"))]
    assert len(shown) == 6
    for line, example in zip(shown[::2], report["examples"], strict=True):
        assert "[[" not in line and line.split(maxsplit=1)[1].replace("│", "") == example["inputs_text"]
    for line, example in zip(shown[1::2], report["examples"], strict=True):
        assert line.split(maxsplit=1)[1].replace("│", "") == f"[[{example['targets_text']}]]".replace(" ", "·")
    ids = inspect(capsys, *words, "--ids")
    assert " ".join(map(str, report["examples"][0]["targets_ids"][:24])) in ids


def test_the_first_token_of_plain_text_bears_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_tokenizer(tmp_path / "tokenizer")
    prefix = write_dataset(tmp_path / "plain", [{"text": "abc"}], tmp_path / "tokenizer", kind="text")
    text = inspect(capsys, prefix, "--show", 1, "--tokenizer", tmp_path / "tokenizer")
    assert "a│[[b│c│</s>]]" in text


def test_a_terminal_gets_colours(
    config: str, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_xmtf.report.marked_tokens.uses_colour", lambda: True)
    text = inspect(capsys, config, "--show", 1, "--tokenizer", directory / "tokenizer")
    assert "\x1b[1;4;32m" in text and "[[" not in text


def test_the_tokenizer_of_the_model_is_found(
    config: str, tiny_hf: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (tiny_hf, tiny_checkpoint):
        assert "</s>]]" in inspect(capsys, config, f"model={model}", "--show", 1)
    assert "give --tokenizer DIR" in inspect(capsys, config, "model=nowhere", "--show", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CONFIG", "--show", "-1"], "--show -1 cannot be negative"),
        (["PREFIX", "seed=1"], "overrides go with a configuration"),
        (["CONFIG", "seed=12345", "--show", "1"], "there is no packing index"),
        (["missing.yaml"], "missing.yaml does not exist"),
    ],
)
def test_mistakes(
    words: list[str], said: str, config: str, prefixes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"CONFIG": config, "PREFIX": prefixes[0]}
    assert said in inspect(capsys, *(given.get(word, word) for word in words), code=2)
