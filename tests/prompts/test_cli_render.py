import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xmtf.cli import main

TEMPLATES = """
task: topic
templates:
- {name: ask, language: en, input: "{{ text }} Topic?", target: "{{ topic }}", answer_choices: [a, b]}
- {name: name_it, input: "{{ text }}", target: "{{ topic }}"}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "T.yaml").write_text(TEMPLATES, encoding="utf-8")
    rows = [{"text": f"größe {number}", "topic": "ab"[number % 2]} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def render(directory: Path, *more: str, source: str = "rows.jsonl") -> int:
    fixed = ["--templates", str(directory / "T.yaml"), "--output", str(directory / "out.jsonl")]
    return main(["render", "--source", str(directory / source), *fixed, *more])


def records(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_render_writes_records_and_counts(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(directory, "--language", "de", "--limit", "3", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 3 and report["rendered"] == 6 and report["templates"]["ask"]["rendered"] == 3
    assert json.loads((directory / "out.jsonl.counts.json").read_text())["rendered"] == 6
    assert records(directory)[0] == {
        "inputs": "größe 0 Topic?",
        "targets": "a",
        "id": "rows.jsonl:0",
        "language": "de",
        "template": "ask",
        "template_language": "en",
        "task": "topic",
        "choices": ["a", "b"],
    }
    assert "größe" in (directory / "out.jsonl").read_text(encoding="utf-8")


def test_nothing_is_overwritten_unasked(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "out.jsonl").write_text("precious")
    assert render(directory) == 2
    assert "--overwrite" in capsys.readouterr().err and (directory / "out.jsonl").read_text() == "precious"
    assert render(directory, "--overwrite", "--template", "name_it") == 0
    assert [record["template"] for record in records(directory)] == ["name_it"] * 5
    assert "5 records name no language" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--template", "aks"], "no template is named 'aks'; nearest: ask"),
        (["--field", "id"], "not of the form NEW=OLD"),
        (["--field", "id=idx"], "no field 'idx'"),
        (["--format", "csv"], "undefined and rendered empty: text (4x)"),
        (["--limit", "0"], "at least one row"),
        (["--field", "topc=topic"], "no record was rendered"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(
    directory: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert render(directory, *more) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error
    assert sorted(path.name for path in directory.iterdir()) == ["T.yaml", "rows.jsonl"]


def test_a_bad_line_leaves_nothing(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(directory / "rows.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"text": "cut off')
    assert render(directory) == 2
    assert "rows.jsonl:6 is not valid JSON" in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir()) == ["T.yaml", "rows.jsonl"]


def test_the_same_bytes_whatever_the_hash_seed(directory: Path) -> None:
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        arguments = ["--source", "rows.jsonl", "--templates", "T.yaml", "--output", "out.jsonl", "--overwrite"]
        command = [sys.executable, "-m", "megatron_xmtf", "render", *arguments]
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, timeout=120)
        outputs.add((directory / "out.jsonl").read_bytes() + (directory / "out.jsonl.counts.json").read_bytes())
    assert len(outputs) == 1


def test_two_workers_make_the_same_bytes(directory: Path) -> None:
    rows = [{"text": f"größe {number}", "topic": "ab"[number % 2]} for number in range(1500)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = []
    for workers in ("1", "2"):
        assert render(directory, "--workers", workers, "--overwrite") == 0
        made.append((directory / "out.jsonl").read_bytes() + (directory / "out.jsonl.counts.json").read_bytes())
    assert made[0] == made[1] and made[0].count(b"\n") > 3000


def test_a_template_given_up_by_one_worker_is_given_up_by_all(directory: Path) -> None:
    jinja = "{% if n == 300 %}{{ text.__class__ }}{% endif %}{{ text }}"
    template = {"name": "walks", "input": jinja, "target": "x"}
    (directory / "T.yaml").write_text(json.dumps({"templates": [template]}), encoding="utf-8")
    rows = [{"text": "t", "n": number} for number in range(1500)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = []
    for workers in ("1", "2"):
        assert render(directory, "--workers", workers, "--overwrite", "--skip-errors") == 0
        made.append((directory / "out.jsonl").read_bytes() + (directory / "out.jsonl.counts.json").read_bytes())
    counts = json.loads((directory / "out.jsonl.counts.json").read_text())["templates"]["walks"]
    assert made[0] == made[1] and (counts["rendered"], counts["failed"]) == (256, 1244)
    assert "row rows.jsonl:300" in counts["rejected"]


def test_unreadable_rows_are_skipped_and_counted_when_asked(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(directory / "rows.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"text": "cut off\n')
    assert render(directory, "--skip-errors") == 0
    assert "rows that cannot be read: 1 (" in capsys.readouterr().out and len(records(directory)) == 10
    (rejected,) = json.loads((directory / "out.jsonl.counts.json").read_text())["rejected_rows"].values()
    assert rejected["rows"] == 1 and "rows.jsonl:6" in rejected["first"]
