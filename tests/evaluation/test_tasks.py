"""Task files and their records: every form that is read, every fault with its place."""

import json
from pathlib import Path

import pytest

from megatron_xmtf.errors import ConfigError, MissingError, RecordError, XmtfError
from megatron_xmtf.evaluation.tasks import load_tasks

RECORD = {"inputs": "After Monday?", "targets": "Tuesday", "choices": ["Friday", "Tuesday"]}


def write(directory: Path, tasks: str, records=None, name: str = "days.jsonl") -> Path:
    (directory / "tasks.yaml").write_text(tasks, encoding="utf-8")
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records or [RECORD]]
    (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory / "tasks.yaml"


DAYS = "- {name: days, language: en, records: days.jsonl}\n"


def test_list_and_mapping_forms_and_relative_paths(tmp_path: Path) -> None:
    records = [RECORD, "", {**RECORD, "choices": ["Tuesday", "a", "b"]}]
    for text in (DAYS, "tasks:\n" + DAYS):
        (task,) = load_tasks([write(tmp_path, text, records)])
        first, second = task.examples
        assert first.choices == ("Friday", "Tuesday") and first.target_index == 1
        assert second.target_index == 0 and second.where.endswith("days.jsonl:3")
        assert first.group == ("days", "en", "", "en")


def test_fixed_choices_replace_the_records(tmp_path: Path) -> None:
    text = "- {name: days, language: en, records: days.jsonl, choices: [Tuesday, Monday]}\n"
    (task,) = load_tasks([write(tmp_path, text)])
    assert task.examples[0].choices == ("Tuesday", "Monday")


def test_one_file_may_hold_many_languages_and_templates(tmp_path: Path) -> None:
    records = [
        {**RECORD, "language": language, "template": template, "template_language": "en"}
        for language in ("de", "sw")
        for template in ("a", "b")
        for _ in range(3)
    ]
    (task,) = load_tasks([write(tmp_path, "- {name: days, records: days.jsonl, limit: 2}\n", records)])
    assert {group: len(places) for group, places in task.groups().items()} == {
        ("days", language, template, "en"): 2 for language in ("de", "sw") for template in ("a", "b")
    }


def test_source_is_rendered_with_templates(tmp_path: Path) -> None:
    (tmp_path / "days.csv").write_text("day,next,other\nMonday,Tuesday,Friday\n", encoding="utf-8")
    (tmp_path / "templates.yaml").write_text(
        "language: en\n"
        "templates:\n"
        "  - name: after\n    input: 'After {{ day }}?'\n    target: '{{ next }}'\n"
        "    answer_choices: ['{{ next }}', '{{ other }}']\n"
        "  - name: then\n    input: '{{ day }}, then'\n    target: '{{ next }}'\n"
        "    answer_choices: ['{{ other }}', '{{ next }}']\n",
        encoding="utf-8",
    )
    task_file = tmp_path / "t.yaml"
    task_file.write_text("- {name: days, language: de, source: days.csv, templates: templates.yaml}\n")
    (task,) = load_tasks([task_file])
    assert [(e.inputs, e.target, e.target_index, e.template) for e in task.examples] == [
        ("After Monday?", "Tuesday", 0, "after"),
        ("Monday, then", "Tuesday", 1, "then"),
    ]
    assert task.examples[0].template_language == "en" and task.examples[0].language == "de"
    task_file.write_text("- {name: d, language: de, source: days.csv, templates: templates.yaml, template: then}\n")
    assert [e.template for e in load_tasks([task_file])[0].examples] == ["then"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, language: en, recrods: days.jsonl}", "unknown key 'tasks.0.recrods', nearest: records"),
        ("- {name: a, language: en, records: days.jsonl, metric: acuracy}", "metric='acuracy'.*'accuracy'"),
        ("- {name: a, language: en}", "exactly one of `records` and `source`"),
        ("- {name: a, language: en, source: days.jsonl}", "`source` and `templates` go together"),
        ("- {name: a, language: en, records: days.jsonl, choices: [one]}", "at least 2"),
        ("- {name: a, language: en, records: days.jsonl, chance: 25}", "less than or equal to 1"),
        ("- {name: a, records: days.jsonl, metric: exact_match, choices: [a, b]}", "has none"),
        ("- {name: a, records: days.jsonl, generation: {max_new_tokens: 3}}", "for metric exact_match"),
        (DAYS + DAYS, "a second time"),
        ("a sentence", "holds a str"),
        ("[]", "at least 1"),
    ],
)
def test_faults_of_the_task_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tasks([write(tmp_path, text)])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**RECORD, "targets": "Sunday"}, "'Sunday' is not among its choices"),
        ({"inputs": "a", "targets": "b"}, "has no `choices`"),
        ({**RECORD, "choices": ["Tuesday", "Tuesday "]}, "at least two different"),
        ({**RECORD, "choices": ["Tuesday", 3]}, "list of texts"),
        ({**RECORD, "inputs": "  "}, "`inputs` is '  '"),
        ({"inputs": "a", "choices": ["a", "b"]}, "`targets` is missing"),
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
    ],
)
def test_faults_of_a_record_name_file_and_line(tmp_path: Path, record, message: str) -> None:
    path = write(tmp_path, DAYS, [RECORD, record])
    with pytest.raises(RecordError, match=rf"days\.jsonl:2.*{message}"):
        load_tasks([path])


def test_invalid_utf8_missing_language_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path, DAYS)
    (tmp_path / "days.jsonl").write_bytes(b'{"inputs": "\xff"}\n')
    with pytest.raises(RecordError, match="days.jsonl:1 is not UTF-8"):
        load_tasks([path])
    with pytest.raises(RecordError, match="has no `language`"):
        load_tasks([write(tmp_path, "- {name: days, records: days.jsonl}")])
    with pytest.raises(MissingError, match="nowhere.jsonl"):
        load_tasks([write(tmp_path, "- {name: days, language: en, records: nowhere.jsonl}")])
    with pytest.raises(RecordError, match="no record"):
        load_tasks([write(tmp_path, DAYS, [""])])
    with pytest.raises(MissingError):
        load_tasks([tmp_path / "absent.yaml"])
    with pytest.raises(XmtfError, match="no task file"):
        load_tasks([])
