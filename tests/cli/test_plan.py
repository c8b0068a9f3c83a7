"""`xmtf plan` as its user runs it."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_xmtf.cli import main
from tests.planning.tiny_mixture import run_config, write_mixture


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def config(tmp_path: Path, prefixes: list[str]) -> str:
    values = run_config(tmp_path, prefixes).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(tmp_path / "train.yaml")


def test_plan_then_pack_use_one_index(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"] == config
    plan = report["data"]
    assert main(["pack", config, "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["index"] == plan["index"]
    for name in ("rows", "examples", "tokens", "target_tokens"):
        assert packed[name] == plan["run"][name], name
    assert packed["fill_fraction"] == pytest.approx(plan["run"]["row_fill"]["mean_fraction"])
    for entry, row in zip(packed["datasets"], plan["entries"], strict=True):
        for name in ("examples", "tokens", "target_tokens", "dropped", "truncated", "empty"):
            assert entry[name] == row[name]
        assert entry["epochs"] == pytest.approx(row["epochs"])
        assert entry["repeats"] == row["examples"] - row["distinct_examples"]


def test_overrides_tables_and_page(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    words = ["plan", config, "--by", "template", "--html", str(page), "schedule.train_steps=5"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "5 steps, 2 of them warm-up; 20 rows of 32 tokens" in text
    assert "by template" in text and "datasets x languages" in text and f"page     {page}" in text
    assert main(["plan", config, "--json", "schedule.train_steps=5"]) == 0
    examples = json.loads(capsys.readouterr().out)["data"]["run"]["examples"]
    assert f"{examples:,} examples (" in text and f"<b>{examples:,}</b>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        (["CONFIG", "--by", "langage"], "no dataset has a column 'langage'"),
        (["CONFIG", "batch.micro_batch_size=3"], "global_batch_size=4 is not a multiple"),
        (["CONFIG", "data.trian=1"], "unknown key 'data.trian'"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], said: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", *(config if word == "CONFIG" else word for word in words), "--html", str(page)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert not page.exists()
