"""Task files of Natural Instructions as rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts import RowReport, Source, read_rows

TASK: dict[str, Any] = {
    "Definition": ["Name the capital.", "Say the capital."],
    "Categories": ["Question Answering"],
    "Input_language": ["English"],
    "Output_language": ["English"],
    "Positive Examples": [{"input": "Peru", "output": "Lima", "explanation": "It is."}],
    "Instance License": ["MIT"],
    "Instances": [
        {"id": "t-1", "input": "Kenya", "output": ["Nairobi"]},
        {"input": "", "output": "Paris"},
    ],
}


def rows_of(path: Path, value: Any, report: RowReport | None = None) -> list[dict[str, Any]]:
    path.write_text(json.dumps(value), encoding="utf-8")
    source = Source(path, format="natural_instructions")
    return list(read_rows(source, on_bad_row="skip" if report else "raise", report=report))


def test_rows_of_a_task(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path / "task1_capital.json", TASK)
    assert first == {
        "id": "t-1",
        "input": "Kenya",
        "output": ["Nairobi"],
        "task": "task1_capital",
        "definition": "Name the capital.",
        "definitions": ["Name the capital.", "Say the capital."],
        "categories": ["Question Answering"],
        "reasoning": [],
        "domains": [],
        "source": [],
        "input_language": ["English"],
        "output_language": ["English"],
        "instruction_language": [],
        "license": ["MIT"],
        "positive_examples": [{"input": "Peru", "output": "Lima", "explanation": "It is."}],
        "negative_examples": [],
    }
    assert "id" not in second and second["output"] == ["Paris"]
    (older,) = rows_of(tmp_path / "task.json", {**TASK, "Definition": "One text.", "Instances": TASK["Instances"][:1]})
    assert older["definition"] == "One text." and older["definitions"] == ["One text."]


def test_damage(tmp_path: Path) -> None:
    path, report = tmp_path / "task.json", RowReport()
    bad = ["text", {"input": "a", "output": []}, {"input": "a", "output": [3]}, {"output": ["a"]}, {"input": "a"}]
    assert len(rows_of(path, {**TASK, "Instances": [*TASK["Instances"], *bad]}, report)) == 2
    assert report.rejected == {"not an object": 1, "no output": 3, "no input": 1}
    assert "task.json: Instances[2] is a str" in report.examples["not an object"]
    for changes, message in [
        ({"Instances": {}}, "a list under `Instances`"),
        ({"Definition": []}, "has no Definition"),
        ({"Definition": [3]}, "'Definition' is neither a text nor a list of texts"),
        ({"Positive Examples": ["a"]}, "'Positive Examples' is not a list of objects"),
    ]:
        with pytest.raises(RecordError, match=message):
            rows_of(path, {**TASK, **changes}, RowReport())


def test_real_tasks(shared_data: Path) -> None:
    paths = tuple(sorted((shared_data / "natural_instructions" / "en").glob("*.json")))
    rows = list(read_rows(Source(paths, format="natural_instructions")))
    expected = []
    for path in paths:
        task = json.loads(path.read_text(encoding="utf-8"))
        for instance in task["Instances"]:
            expected.append((instance["id"], instance["input"], instance["output"], path.stem, task["Definition"][0]))
    assert len(paths) == 28 and len(expected) == 7877
    assert [(row["id"], row["input"], row["output"], row["task"], row["definition"]) for row in rows] == expected
    assert all(row["license"] and row["positive_examples"] for row in rows)
