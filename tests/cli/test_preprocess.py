"""`xmtf preprocess`, `merge` and `inspect` as a user calls them."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_xmtf.cli import main
from tests.data.conftest import make_tokenizer
from tests.data.test_preprocess import GOOD, write


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_verbs(tmp_path: Path, tokenizer_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix, tokenizer = write(tmp_path / "r.jsonl", GOOD, "{"), str(tmp_path / "d"), str(tokenizer_directory)
    command = ["preprocess", "--input", str(source), "--tokenizer", tokenizer, "--output-prefix", prefix]
    assert main(command) == 2
    assert f"RecordError: {source}:2 is not a record" in capsys.readouterr().err
    assert main([*command, "--on-bad-record", "skip"]) == 0
    assert "1 examples kept of 2 records" in capsys.readouterr().out
    assert main([*command, "--on-bad-record", "skip", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["malformed_reasons"] == {"invalid_json": 1}
    assert main(["merge", "--input", prefix, prefix, "--output-prefix", f"{prefix}2"]) == 0
    capsys.readouterr()
    assert main(["inspect", f"{prefix}2", "--show", "5", "--tokenizer", tokenizer, "--deep", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == 2 and report["unaltered"] is True
    assert [example["targets_text"] for example in report["examples"]] == [" twelve</s>"] * 2
    assert main(["inspect", f"{prefix}2.json", "--show", "1", "--tokenizer", tokenizer]) == 0
    shown = capsys.readouterr().out
    assert "twelve" in shown and "2 examples of kind pairs" in shown
    assert main(["inspect", str(tmp_path)]) == 2
    assert "directory of datasets" in capsys.readouterr().err


def test_inspect_checkpoint_and_packing_index(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step_0000000"
    shutil.copytree(tiny_checkpoint, copy)
    assert main(["inspect", str(tmp_path / "run"), "--deep", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["type"], report["step"], report["unaltered"]) == ("checkpoint", 0, True)
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "checkpoint of step 0" in capsys.readouterr().out
    shard = next(copy.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(tmp_path / "run"), "--deep"]) == 5
    assert shard.name in capsys.readouterr().err

    (tmp_path / "packing").mkdir()
    (tmp_path / "packing" / "packing.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "packing")]) == 2
    assert "is damaged" in capsys.readouterr().err
