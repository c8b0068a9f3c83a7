"""The README is true: its commands run, its keys exist, its tree is the tree, its figures are the measured ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from megatron_xmtf.cli import VERBS, main
from megatron_xmtf.config import DatasetConfig, RunConfig, config_from_mapping, load_config
from megatron_xmtf.errors import ExitCode
from tests.tiny import write_tiny_bloom

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN_YAML = ROOT / "examples" / "own_data" / "train.yaml"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of one language tag."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(title: str) -> list[list[str]]:
    """Return the rows of a section's first table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_own_data_in_six_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command as printed, in a fresh directory with a tiny model, through the function that `xmtf` calls."""
    (walk,) = blocks("bash test")
    commands = [shlex.split(line) for line in walk.splitlines()]
    assert [words[:2] for words in commands] == [
        ["xmtf", verb] for verb in ("preprocess", "pack", "train", "evaluate", "export", "verify")
    ]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    write_tiny_bloom(tmp_path / "models" / "bloom")
    monkeypatch.chdir(tmp_path)
    for words in commands:
        assert main(words[1:]) == 0, " ".join(words)
    assert "the same model" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    results = json.loads((tmp_path / "runs/first/evaluation/results.json").read_text())["results"]
    assert {result["language"] for result in results} == {"fr", "es", "pt", "id", "sw", "vi", "hi", "ar"}
    for named in ("status.json", "config.yaml", "checkpoints", "packing", "evaluation/report.html"):
        assert (tmp_path / "runs" / "first" / named).exists(), named


def test_printed_configuration_is_the_examples() -> None:
    (printed,) = blocks("yaml")
    assert printed == TRAIN_YAML.read_text(encoding="utf-8")
    config_from_mapping(yaml.safe_load(printed.replace("1e-4", "0.0001")), RunConfig, source="README.md")


def test_configuration_table_names_every_key() -> None:
    named = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table("Configuration")}
    top = named.pop("(top)")
    sections = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections[name] = set(field.annotation.model_fields)
    assert named.pop("data") == sections.pop("data") | set(DatasetConfig.model_fields)
    assert named == sections
    assert top == set(RunConfig.model_fields) - set(sections) - {"data"}


@pytest.mark.parametrize("row", table("Parallel layouts"), ids=lambda row: row[0])
def test_layout_can_be_asked_for(row: list[str]) -> None:
    words = shlex.split(row[1].strip("`"))
    assert words[:3] == ["xmtf", "train", "train.yaml"]
    processes = int(words[words.index("--nproc") + 1])
    config = load_config(TRAIN_YAML, [word for word in words if "=" in word])
    parallel = config.parallel
    share = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assert processes % share == 0
    assert config.batch.global_batch_size % (config.batch.micro_batch_size * processes // share) == 0


def test_verbs_are_those_of_the_command() -> None:
    assert [row[0].strip("`").split()[1] for row in table("Verbs")] == list(VERBS)
    assert set(re.findall(r"xmtf ([a-z]+)", README)) <= set(VERBS)


def test_exit_codes_are_those_of_the_command() -> None:
    assert [int(row[0]) for row in table("Exit codes")] == [int(code) for code in ExitCode]


def test_tree_is_the_tree() -> None:
    """Every module is named under its folder, and everything named exists."""
    named, folders = set(), [ROOT]
    (tree,) = re.findall(r"```\n(megatron_xmtf/\n.*?)```", README, re.DOTALL)
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r" {2,}", line.strip()):
            if not re.fullmatch(r"[\w/]+/|\w+\.(py|md|yaml|txt|toml)|Makefile", name):
                continue
            path = folders[depth] / name
            assert path.exists(), f"the README's tree names {path.relative_to(ROOT)}, which is not there"
            if name.endswith("/"):
                folders[depth + 1 :] = [path]
            else:
                named.add(path)
    modules = {
        path
        for top in ("megatron_xmtf", "tools", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    missing = sorted(str(path.relative_to(ROOT)) for path in modules - named)
    assert not missing, f"the README's tree does not name {', '.join(missing)}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:^|`)(make [^`#\n]*)", README, re.MULTILINE))))
def test_make_targets_exist(command: str) -> None:
    words = shlex.split(command)
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def test_first_screen_has_both_commands_and_ci_runs_one() -> None:
    first_screen = "\n".join(README.splitlines()[:30])
    assert "make quickstart" in first_screen
    assert "make test" in first_screen
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/decisions.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{document} links to {target}"
        elif "://" not in target:
            assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


def test_packing_figures_are_the_measured_ones() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())["results"]
    for result in measured:
        for rule in ("ours", "next_fit", "first_fit_decreasing", "trl_bfd"):
            if rule in result:
                cell = f"{result[rule]['seconds']:.2f} s, {100 * result[rule]['fill_fraction']:.3f} % filled"
                assert cell in README, f"{rule}, {result['examples']} examples: {cell}"
