from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.errors import MissingError, TemplateError
from megatron_xmtf.prompts import load_templates, parse_templates, select_templates

PROMPTSOURCE = """
dataset: amazon
subset: null
templates:
  0edd8660-f299-4819-a5ac-633c11177228: !Template
    answer_choices: No ||| Yes
    id: 0edd8660-f299-4819-a5ac-633c11177228
    jinja: '{{ review }} Good? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: "is \\"it\\" good, C1/C2_zhmt"
    reference: ''
  1edd8660-f299-4819-a5ac-633c11177228: !Template
    answer_choices: ''
    id: 1edd8660-f299-4819-a5ac-633c11177228
    jinja: Write a review ||| {{ review -}}
    metadata: !TemplateMetadata
      choices_in_prompt: null
      languages: null
      metrics: null
      original_task: null
    name: write
    reference: ''
"""


def own(**changes: Any) -> dict[str, Any]:
    entry = {
        "name": "one",
        "input": "{{ text }}",
        "target": "{{ answer_choices[label] }}",
        "answer_choices": ["a", "b"],
    }
    entry.update(changes)
    return {"templates": [{key: value for key, value in entry.items() if value is not None}]}


def test_promptsource_form(tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(PROMPTSOURCE, encoding="utf-8")
    first, second = load_templates(path)
    assert first.name == 'is "it" good, C1/C2_zhmt' and first.language == "zh"
    assert (first.dataset, first.config, first.metrics) == ("amazon", None, ("Accuracy",))
    assert first.answer_choices == "No ||| Yes" and first.choices_in_prompt is True
    assert first.prompt_jinja == (
        "{{ review  | string | truncate(2048) }} Good? ||| {{ answer_choices[label]  | string | truncate(2048) }}"
    )
    assert second.answer_choices is None and second.language is None and second.choices_in_prompt is None
    assert second.prompt_jinja == "Write a review ||| {{ review  | string | truncate(2048) -}}"
    assert select_templates([first, second], ["write"]) == [second]
    with pytest.raises(TemplateError, match="no template is named 'writ'; nearest: write"):
        select_templates([first, second], ["writ"])


def test_own_form_reads_words_as_words(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "language: no\ntask: nli\ntemplates:\n- {name: q, input: '{{ a }}', target: '{{ b }}', "
        "answer_choices: [yes, no, 7, 2020-01-01], metric: accuracy, metadata: {original_task: true}}\n",
        encoding="utf-8",
    )
    (template,) = load_templates(path)
    assert template.answer_choices == "yes ||| no ||| 7 ||| 2020-01-01"
    assert (template.language, template.task, template.metrics) == ("no", "nli", ("accuracy",))
    assert template.prompt_jinja == "{{ a }}|||{{ b }}" and template.original_task is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": ""}, "name='' is not a non-empty string"),
        ({"target": None}, "target=None is not a non-empty string"),
        ({"inputs": "x"}, "unknown key 'inputs', nearest: input"),
        ({"input": "a ||| b"}, "stands between input and target by itself"),
        ({"answer_choices": []}, "neither a list nor a Jinja expression"),
        ({"answer_choices": [True, False]}, "the answer choice True is not a string; put it in quotes"),
        ({"answer_choices": ["a ||| b"]}, "list the choices one by one"),
        ({"metadata": {"chocies_in_prompt": True}}, "unknown key 'chocies_in_prompt'"),
        ({"truncate_characters": 0}, "not a positive number"),
        ({"strip_connection": "no"}, "neither true nor false"),
        ({"input": "{{ text"}, "line 1: "),
        ({"input": "{{ text | uper }}"}, "no filter 'uper'; nearest: upper"),
        ({"input": "{% if text is eevn %}x{% endif %}"}, "no test 'eevn'; nearest: even"),
        ({"input": "{% include 'x' %}"}, "'include' is refused"),
        ({"input": "{% import 'x' as y %}"}, "'import' is refused"),
        ({"input": "x" * 100_001}, "may have 100,000"),
        ({"input": "{{" + "(" * 50_000 + "1" + ")" * 49_000 + "}}"}, "cannot be parsed: RecursionError"),
        ({"input": "{{ " + "9" * 5_000 + " }}"}, "cannot be parsed: ValueError"),
        ({"answer_choices": "{{ choices | jion }}"}, "answer_choices, line 1: no filter 'jion'; nearest: join"),
        ({"input": "{{ {'a': {}}}}", "truncate_characters": 9}, "with the truncation to 9 characters written in"),
    ],
)
def test_bad_own_template(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse_templates(own(**changes), source="T.yaml")
    assert reason in str(caught.value) and "T.yaml" in str(caught.value)


def test_parsing_runs_nothing() -> None:
    """Jinja folds constants when it compiles: 9 ** (9 ** 9) would not end here."""
    endless = "{{ 9 ** (9 ** 9) }}"
    thought = {"input": endless + "{{ input }}", "target": "{{ rationale }}" + endless + "{{ target }}"}
    values = own(input=endless, answer_choices=endless, rationale=endless, chain_of_thought=thought)
    (template,) = parse_templates(values)
    assert not template.lists_choices and not template.places_options


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: &y [*x, *x]\nc: &z [*y, *y]\n", ":2:8 cannot be read as YAML: an anchor (&name) over an alias"),
        ("a: &x [" + "1, " * 100 + "]\nb: *x\n", "over more than 64 nodes"),
        ("a: &x [*x]\n", "over an alias"),
        ("templates: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
        ("templates: !Secret {a: 1}\n", "cannot be read as YAML"),
        ("templates: !Template [1]\n", "is not a mapping"),
        ("templates: []\ntemplates: []\n", ":2:1 cannot be read as YAML: key 'templates' appears twice"),
        ("? [a]\n: 1\n", "a key is not a scalar"),
        ("templates: " + "[" * 100, "nested over 32 deep"),
        ("templates: " + "[" * 100_000, "nest"),  # PyYAML has a limit of its own since 6.0.4
        ("templates: {", "cannot be read as YAML"),
        ("just text", "is not a template file"),
        ("templates: []\n", "holds no template"),
        ("templates: [7]\n", "template 0 is a int"),
        ("templates: {u: {name: n, jinja: 'no separator'}}\n", "has no '|||'"),
        ("templates: {u: {name: n, jinja: 7}}\n", "jinja=7 is not a non-empty string"),
        (
            "templates: {u: {name: n, jinja: 'a|||b'}, v: {name: n, jinja: 'a|||b'}}\n",
            "two templates are named 'n'",
        ),
        ("datset: x\ntemplates: {}\n", "unknown key 'datset', nearest: dataset"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "T.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TemplateError) as caught:
        load_templates(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)


def test_file_that_is_absent_huge_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        load_templates(tmp_path / "absent.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (5 << 20))
    with pytest.raises(TemplateError, match="may have 4,194,304"):
        load_templates(tmp_path / "huge.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match="not UTF-8"):
        load_templates(tmp_path / "bytes.yaml")


def test_every_real_template_file_opens(shared_data: Path) -> None:
    files = sorted((shared_data / "promptsource_templates").rglob("*.yaml"))
    templates = [template for path in files for template in load_templates(path)]
    assert len(files) == 104 and len(templates) == 863
    assert sum(template.answer_choices is None for template in templates) == 192 + 132
    assert {"zh", "ar", "sw"} <= {template.language for template in templates}


def test_example_templates_open() -> None:
    directory = Path(__file__).parents[2] / "examples" / "templates"
    names = {path.name: [template.name for template in load_templates(path)] for path in directory.glob("*.yaml")}
    assert {"xcopa.yaml", "sib200.yaml"} <= set(names)
