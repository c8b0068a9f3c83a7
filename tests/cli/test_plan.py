"""`xmtf plan` as its user runs it."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_xmtf.cli import main
from tests.planning.tiny_mixture import run_config, write_mixture
from tests.tiny import write_tiny_tokenizer


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


def test_a_recipe_is_planned_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    words = ["plan", "bloomz-176b", "--cluster", "jean-zay-a100-80", "--gpus", "288"]
    assert main([*words, "--html", str(page), "--search", "2"]) == 0
    text = capsys.readouterr().out
    assert "data     not planned: model and output are not given" in text
    assert "176,247,271,424 parameters" in text and "TP1 PP72 DP4 MBS1, recompute full" in text
    assert "fastest of" in text and "data not planned" in page.read_text(encoding="utf-8")
    assert main([*words, "--json", "cluster.memory_gib=30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"] is None and report["why_no_data"] == "model and output are not given"
    hardware = report["hardware"]
    assert not hardware["fits"] and hardware["cluster"]["memory_gib"] == 30
    assert sum(stage["total"] for stage in hardware["memory"]) > 0 and len(hardware["memory"]) == 72
    assert hardware["largest_gib"] > 30 and hardware["warnings"][0]["is_refused"]


def test_data_at_hand_is_planned_with_the_hardware(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny mixture's part of positions with a loss lightens the output layer."""
    model = tmp_path / "bloom"
    write_tiny_tokenizer(model)
    sizes = {"model_type": "bloom", "hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300}
    (model / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    words = ["plan", config, f"model={model}", "--cluster", "h100", "--gpus", "1", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    run, hardware = report["data"]["run"], report["hardware"]
    fraction = hardware["layout"]["loss_fraction"]
    assert fraction == pytest.approx(run["target_tokens"] / (run["rows"] * 32)) and 0 < fraction < 1
    assert hardware["run"]["target_tokens_per_second"] == pytest.approx(fraction * hardware["run"]["tokens_per_second"])
    assert main([*words, "--no-data"]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert bare["data"] is None and bare["why_no_data"] == "--no-data"
    assert bare["hardware"]["layout"]["loss_fraction"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bloomz-176b", "--cluster", "h100"], "--cluster needs --gpus N"),
        (["bloomz-176b", "--gpus", "8"], "name it with --cluster"),
        (["bloomz-176b", "--cluster", "h300", "--gpus", "8"], "neither a preset"),
        (["bloomz-176b", "--cluster", "h100", "--gpus", "8"], "8 GPUs are not a multiple"),
        (["bloomz-176b", "--cluster", "h100", "--gpus", "288", "cluster.memory=1"], "unknown key 'memory'"),
        (["bloomz-176b", "--cluster", "h100", "--gpus", "288", "--by", "task"], "--by task counts the data"),
        (["bloomz-176b", "--cluster", "h100", "--gpus", "288", "model=/nowhere"], "model=/nowhere is no directory"),
    ],
)
def test_mistakes_about_the_cluster_are_one_message(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
