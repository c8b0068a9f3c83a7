import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from megatron_xmtf.errors import RecordError, TemplateError
from megatron_xmtf.prompts import (
    RenderReport,
    Source,
    Template,
    load_templates,
    parse_templates,
    read_rows,
    render_rows,
)

COPA = {
    "premise": "My eyes became red.",
    "choice1": "I cried.",
    "choice2": "I laughed.",
    "question": "cause",
    "label": 0,
    "id": "r7",
}


def template(jinja: str, choices: str | None = None, **options: Any) -> Template:
    return Template(name="t", jinja=jinja, answer_choices=choices, **options)


def only(row: dict[str, Any], one: Template, **options: Any) -> Any:
    records = list(render_rows([row], [one], seed=options.pop("seed", 0), **options))
    assert len(records) == 1
    return records[0]


def test_record_of_the_docstring() -> None:
    (one,) = parse_templates(
        {
            "dataset": "xcopa",
            "config": "en",
            "language": "en",
            "task": "causal_choice",
            "templates": [
                {
                    "name": "cause_or_effect",
                    "input": '{{ premise }} {{ "Why?" if question == "cause" else "What then?" }}\n',
                    "target": "{{ answer_choices[label] }}",
                    "answer_choices": ["{{ choice1 }}", "{{ choice2 }}"],
                }
            ],
        }
    )
    record = only(COPA, one, split="val", language="en")
    assert record.choice_index == 0
    assert record.to_json() == {
        "inputs": "My eyes became red. Why?",
        "targets": "I cried.",
        "id": "r7",
        "dataset": "xcopa",
        "config": "en",
        "split": "val",
        "language": "en",
        "template": "cause_or_effect",
        "template_language": "en",
        "task": "causal_choice",
        "choices": ["I cried.", "I laughed."],
    }


def test_metadata_is_the_callers_else_the_rows_else_the_templates() -> None:
    one = template("{{ a }}|||b", dataset="of template", task="of template", language="en")
    record = only({"a": 1, "dataset": "of row", "language": "sw", "split": 3}, one, task="given")
    assert (record.dataset, record.task, record.language, record.template_language) == ("of row", "given", "sw", "en")
    assert record.split is None and record.config is None


def test_separator_inside_the_rows_text_survives() -> None:
    row = {"text": "a ||| b", "deep": {"list": ["c|||d"]}, "label": 1}
    one = template("{{ text }} {{ deep.list[0] }} ||| {{ answer_choices[label] }}", "{{ text }} ||| {{ deep.list[0] }}")
    record = only(row, one)
    assert record.inputs == "a ||| b c|||d" and record.targets == "c|||d"
    assert record.choices == ["a ||| b", "c|||d"] and record.choice_index == 1
    odd = {"text": "a ||| " + "\ufdd0" * 3 + "\ufdd1" * 3}
    assert only(odd, template("{{ text }} ||| x")).inputs == odd["text"]


def test_connection_is_stripped_or_kept() -> None:
    assert only({}, template("  def f():\n    ||| \n  return 1 ")).targets == "return 1"
    kept = only({}, template("  def f():\n    |||  return 1\n ", strip_connection=False))
    assert (kept.inputs, kept.targets) == ("def f():\n    ", "  return 1")


def test_truncation_is_promptsources() -> None:
    long = "word " * 1000
    record = only({"x": long}, template("{{ x }} ||| {{ x[:5] }}", "{{ x }}", truncate_characters=2048))
    assert len(record.inputs) <= 2048 and record.inputs.endswith("word...")
    assert record.choices == [long.strip()]


def test_names_with_hyphens_and_undefined_names() -> None:
    report = RenderReport()
    record = only({"a-b": "x"}, template("{{ a_b }}{{ misspelt }}{{ misspelt.again if misspelt }}|||y"), report=report)
    assert record.inputs == "x"
    assert report.templates["t"].undefined == {"misspelt": 1}


def test_filters_of_promptsource() -> None:
    row = {"votes": ["b", "a", "b", "c", "a"], "a": [1, 2], "b": ["x", "y"]}
    jinja = "{{ votes | most_frequent | join(',') }} {% for m, n in zip(a, b) %}{{ m }}{{ n }}{% endfor %} "
    jinja += "{{ 'z' | highlight }}{{ [] | most_frequent }}|||{{ votes | choice }}"
    record = only(row, template(jinja))
    assert record.inputs == "b,a 1x2y <span style='color: #F08080'>z</span>None"
    assert record.targets in row["votes"]


def test_draws_follow_from_seed_row_and_template_alone() -> None:
    one = template("{{ id }} {{ range(1000) | list | random }} {{ range(1000) | list | choice }}|||x")
    other = Template(name="u", jinja="{{ [1, 2] | choice }}|||x")
    rows = [{"id": str(number)} for number in range(700)]

    def drawn(some: list[dict[str, Any]], templates: list[Template], seed: int) -> dict[str, str]:
        return {r.id: r.inputs for r in render_rows(some, templates, seed=seed) if r.template == "t"}

    whole = drawn(rows, [one], 5)
    assert drawn(rows, [one], 5) == whole
    assert drawn(rows[::-1], [other, one], 5) == whole
    assert drawn(rows[300:310], [one], 5).items() <= whole.items()
    reseeded = drawn(rows, [one], 6)
    assert sum(reseeded[key] == whole[key] for key in whole) < 10
    draws = [int(text.split()[1]) for text in whole.values()]
    assert len(set(draws)) > 450 and abs(sum(draws) / len(draws) - 500) < 50
    assert sum(text.split()[1] == text.split()[2] for text in whole.values()) < 10


def test_what_renders_nothing_is_counted() -> None:
    one = template(
        "{% if ok %}{{ text }} ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}{% endif %}", "a|||b"
    )
    rows = [
        {"ok": True, "text": "x", "label": 1},
        {"ok": False, "text": "x", "label": 1},
        {"ok": True, "text": " ", "label": 1},
        {"ok": True, "text": "x", "label": -1},
        {"ok": True, "text": "x", "label": 7},
    ]
    report = RenderReport()
    assert [record.targets for record in render_rows(rows, [one], seed=0, report=report)] == ["b"]
    counts = report.templates["t"]
    assert (counts.rendered, counts.blank, counts.no_input, counts.no_target) == (1, 1, 1, 2)
    assert report.rows == 5 == counts.rendered + counts.blank + counts.no_input + counts.no_target + counts.failed


def test_targets_outside_the_choices_are_counted() -> None:
    report = RenderReport()
    record = only({"a": "z"}, template("q ||| {{ a }}", "x ||| y"), report=report)
    assert record.choice_index is None and report.templates["t"].target_not_in_choices == 1


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% if no %}|||{% endif %}text", "renders 0 separators"),
        ("a ||| b {{ '|' * 3 }} c", "renders 2 separators"),
        ("{{ missing.field }} ||| b", "UndefinedError: 'missing' is undefined"),
        ("{{ 1 // 0 }} ||| b", "ZeroDivisionError"),
        ("{{ ['a'].index(text) }} ||| b", "ValueError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }} ||| b", "RecursionError"),
        ("{{ '\\ud800' }} ||| b", "not Unicode"),
    ],
)
def test_failures_name_template_and_row_or_are_counted(jinja: str, reason: str) -> None:
    rows = [{"text": "x", "id": "r1"}]
    with pytest.raises(TemplateError) as caught:
        list(render_rows(rows, [template(jinja, source="T.yaml")], seed=0))
    assert reason in str(caught.value) and "T.yaml: template 't'" in str(caught.value) and "r1" in str(caught.value)
    report = RenderReport()
    assert list(render_rows(rows, [template(jinja)], seed=0, report=report, on_error="skip")) == []
    counts = report.templates["t"]
    assert reason in (counts.first_failure or counts.rejected or "")
    assert counts.failed == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a-b": 1, "a_b": 2}, "differ only in - and _"),
        ({"answer_choices": []}, "the template's own"),
        ({"x": {1, 2}}, "not a JSON value"),
        ({"x": "\ud800"}, "lone surrogate"),
        ({"x": "a" * (17 << 20)}, "a row may have"),
    ],
)
def test_rows_that_cannot_be_variables(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        list(render_rows([row], [template("a|||b")], seed=0))


def test_two_templates_of_one_name() -> None:
    with pytest.raises(TemplateError, match="same name"):
        render_rows([], [template("a|||b"), template("c|||d")], seed=0)


def test_rows_are_streamed() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield {"n": taken}

    records = render_rows(endless(), [template("{{ n }}|||x")], seed=0)
    assert [next(records).inputs for _ in range(3)] == ["1", "2", "3"]
    assert taken < 2000
    records.close()  # type: ignore[attr-defined]


# An oracle that shares nothing with the package: PyYAML's own loader, plain Jinja, promptsource's steps one by one.


class PlainLoader(yaml.SafeLoader):
    pass


for tag in ("!Template", "!TemplateMetadata"):
    PlainLoader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))


@functools.cache
def compile_plainly(text: str) -> jinja2.Template:
    environment = jinja2.Environment()
    environment.globals["zip"] = zip
    environment.filters["choice"] = lambda items: items[0]
    return environment.from_string(text)


def render_plainly(entry: dict[str, Any], row: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    choices = None
    if entry["answer_choices"] is not None:
        choices = [part.strip() for part in compile_plainly(entry["answer_choices"]).render(**row).split("|||")]
    text = entry["jinja"].replace("}}", " | string | truncate(2048) }}")
    rendered = compile_plainly(text).render(**row, answer_choices=choices)
    return [part.strip() for part in rendered.split("|||")], choices


def test_real_templates_on_real_rows_equal_plain_jinja(real_pairs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    compared = blank = drawn = 0
    for path, rows in real_pairs:
        report = RenderReport()
        records = {(r.id, r.template): r for r in render_rows(rows, load_templates(path), seed=1, report=report)}
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)["templates"].values()
        for number, row in enumerate(rows):
            for entry in entries:
                record = records.get((str(row.get("id", number)), entry["name"]))
                if "choice }}" in entry["jinja"] or "random" in entry["jinja"]:
                    drawn += 1
                    continue
                parts, choices = render_plainly(entry, row)
                if record is None:
                    assert len(parts) == 1 and parts[0] == "" or "" in parts, (path, entry["name"])
                    blank += 1
                    continue
                assert [record.inputs, record.targets] == parts, (path, entry["name"])
                assert (record.choices or [""]) == (choices or [""])
                if record.choices:
                    assert record.choice_index == choices.index(parts[1])
                compared += 1
        for name, counts in report.templates.items():
            assert counts.failed == counts.target_not_in_choices == 0 and not counts.rejected, (path, name)
    assert compared > 4000 and blank > 50 and drawn > 100, (compared, blank, drawn)


def test_example_templates_on_real_rows(shared_data: Path) -> None:
    examples = Path(__file__).parents[2] / "examples" / "templates"
    source = Source(shared_data / "sib200/swh_Latn/test.tsv", quoting="csv", fields={"id": "index_id"})
    xcopa = read_rows(shared_data / "xcopa/data/zh/test.zh.jsonl")
    for rows, name, chance in ((read_rows(source), "sib200.yaml", 7), (xcopa, "xcopa.yaml", 2)):
        report = RenderReport()
        templates = load_templates(examples / name)
        records = list(render_rows(rows, templates, seed=0, language="xx", report=report))
        assert len(records) == report.rows * len(templates) > 1000
        for record in records:
            assert record.choices is not None and len(record.choices) == chance == len(set(record.choices))
            assert record.choice_index is not None and record.task and record.dataset == name.removesuffix(".yaml")
            assert "\n\n\n" not in record.inputs and record.template_language == record.template[-2:]
        assert not any(counts.undefined for counts in report.templates.values())
        by_row: dict[str, set[int | None]] = {}
        for record in records:
            by_row.setdefault(record.id, set()).add(record.choice_index)
        assert all(len(indices) == 1 for indices in by_row.values()), "every template must mean the same answer"
        json.dumps([record.to_json() for record in records])
