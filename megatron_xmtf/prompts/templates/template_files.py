r"""Read prompt templates: promptsource's `templates.yaml`, and our own shorter form.

Our own form has a list where promptsource has a mapping of uuids:

    dataset: xcopa                       # optional, for every template of the file: dataset, config, language, task
    language: en                         # the language that the prompts are worded in (not that of the rows)
    templates:
      - name: cause_or_effect            # unique in the file
        input: |                         # Jinja over the fields of a row
          {{ premise }} {{ "Why?" if question == "cause" else "What then?" }}
        target: "{{ answer_choices[label] }}"
        answer_choices: ["{{ choice1 }}", "{{ choice2 }}"]   # a list, or one Jinja expression that renders "a ||| b";
                                         # left out: open generation
        metric: accuracy                 # optional; also task, language, dataset, config
        strip_connection: true           # optional; false keeps the white space where input and target meet (code)
        truncate_characters: 2048        # optional; cuts every {{ ... }} of input and target (default: nothing is cut)
        rationale: "{{ explanation }}"   # optional; the reasoning, for variants with `cot`
        chain_of_thought:                # optional; how input, reasoning and answer are put together under `cot`
          input: "{{ input }}\nLet's think step by step."                    # default: "{{ input }}"
          target: "{{ rationale }} The answer is {{ target }}."              # default: "{{ rationale }}\n{{ target }}"
        metadata: {choices_in_prompt: false, original_task: true, reference: "..."}   # optional

The input of a template says where a list of options goes by `{{ options_block }}`, which is empty in the variants
without one; where it does not, the list follows the input. `chain_of_thought` sees the rendered `input`, `target` and
`rationale` beside the row's fields. `variants.py` tells what is made of all this.

    row          {"question": "2+2?", "answer": "4", "explanation": "2 and 2 are 4."}
    plain        2+2?                                  4
    cot          2+2? / Let's think step by step.      2 and 2 are 4. The answer is 4.

In both forms only `true` and `false` are booleans, so that `no` is a word (and Norwegian) and needs no quotes.
Promptsource's tags `!Template` and `!TemplateMetadata` are read as plain mappings; every other tag is refused. Its
rule that `{{ x }}` is cut to 2,048 characters is textual, as there: every `}}` of the prompt becomes
` | string | truncate(2048) }}`; the answer choices are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_xmtf.errors import TemplateError, nearest_names
from megatron_xmtf.files import require_file
from megatron_xmtf.prompts.templates.template import (
    CHAIN_OF_THOUGHT_INPUT,
    CHAIN_OF_THOUGHT_TARGET,
    SEPARATOR,
    Template,
)
from megatron_xmtf.prompts.templates.template_yaml import parse_template_yaml

__all__ = ["load_templates", "parse_templates"]

PROMPTSOURCE_TRUNCATION = 2048
"""Characters that promptsource leaves of every inserted field (its TEXT_VAR_LENGTH)."""
MAX_YAML_BYTES = 4 << 20
LANGUAGE_SUFFIX = re.compile(r"_([a-z]{2,3})([mh])t$")
"""Names of promptsource's translated templates: `_zhmt` by machine, `_zhht` by people."""
TRANSLATIONS: dict[str, Literal["human", "machine"]] = {"m": "machine", "h": "human"}


def load_templates(path: Path | str) -> list[Template]:
    """Read a file of templates in either form; their Jinja is parsed, not run.

    Raises:  MissingError: no such file. TemplateError: not such a file; names template, line and reason.
    """
    path = require_file(path)
    size = path.stat().st_size
    if size > MAX_YAML_BYTES:
        raise TemplateError(f"{path} has {size:,} bytes; a template file may have {MAX_YAML_BYTES:,}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path} is not UTF-8: byte {error.start} cannot be decoded.") from error
    return parse_templates(parse_template_yaml(text, source=str(path)), source=str(path))


def parse_templates(values: Any, *, source: str = "memory") -> list[Template]:
    """Make templates out of a file's content, or out of the same mapping made in memory.

    Args:    values: {"templates": [...]} of our form, or promptsource's {"dataset", "subset", "templates": {...}}.
    Raises:  TemplateError: as `load_templates`.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("templates"), list | Mapping):
        raise TemplateError(
            f"{source} is not a template file: it needs a key `templates` with a list (our form) or a mapping of "
            "uuids (promptsource)."
        )
    entries = values["templates"]
    if isinstance(entries, list):
        defaults = _known(values, {"templates", *_OWN_DEFAULTS}, f"{source}: top level")
        found = [_own_template(entry, defaults, number, source) for number, entry in enumerate(entries)]
    else:
        _known(values, {"dataset", "subset", "templates"}, f"{source}: top level")
        found = [_promptsource_template(entry, values, str(uuid), source) for uuid, entry in entries.items()]
    if not found:
        raise TemplateError(f"{source} holds no template.")
    seen: set[str] = set()
    for template in found:
        if template.name in seen:
            raise TemplateError(f"{source}: two templates are named {template.name!r}; records go by the name.")
        seen.add(template.name)
        template.check()
    return found


_OWN_DEFAULTS = ("dataset", "config", "language", "task")
_OWN_KEYS = {
    "name",
    "input",
    "target",
    "answer_choices",
    "metric",
    "strip_connection",
    "truncate_characters",
    "metadata",
    "rationale",
    "chain_of_thought",
    "translation",
}


def _own_template(entry: Any, defaults: Mapping[str, Any], number: int, source: str) -> Template:
    where = f"{source}: template {number}"
    if not isinstance(entry, Mapping):
        raise TemplateError(f"{where} is a {type(entry).__name__}; a template is a mapping with name, input, target.")
    name = _string(entry, "name", where, required=True)
    where = f"{source}: template {name!r}"
    values = _known(entry, {*_OWN_KEYS, *_OWN_DEFAULTS}, where)
    metadata = _known(
        values.get("metadata") or {}, {"choices_in_prompt", "original_task", "reference"}, f"{where}: metadata"
    )
    text, target = _string(values, "input", where, required=True), _string(values, "target", where, required=True)
    if SEPARATOR in text or SEPARATOR in target:
        raise TemplateError(f"{where}: {SEPARATOR!r} stands between input and target by itself; remove it.")
    metric = _string(values, "metric", where)
    thought_input, thought_target = _chain_of_thought(values, where)
    return Template(
        name=name,
        jinja=f"{text}{SEPARATOR}{target}",
        answer_choices=_own_choices(values.get("answer_choices"), where),
        strip_connection=_boolean(values, "strip_connection", where) is not False,
        truncate_characters=_positive(values, "truncate_characters", where),
        metrics=(metric,) if metric else (),
        choices_in_prompt=_boolean(metadata, "choices_in_prompt", where),
        original_task=_boolean(metadata, "original_task", where),
        translation=_translation(values, where),
        rationale=_string(values, "rationale", where) or None,
        chain_of_thought_input=thought_input,
        chain_of_thought_target=thought_target,
        source=source,
        **{key: _string(values, key, where) or _string(defaults, key, source) or None for key in _OWN_DEFAULTS},
    )


def _chain_of_thought(values: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return how input and target of a chain of thought are made."""
    given = values.get("chain_of_thought")
    if given is None:
        return CHAIN_OF_THOUGHT_INPUT, CHAIN_OF_THOUGHT_TARGET
    if not values.get("rationale"):
        raise TemplateError(f"{where}: chain_of_thought needs a rationale; add one, or remove chain_of_thought.")
    parts = _known(given, {"input", "target"}, f"{where}: chain_of_thought")
    return (
        _string(parts, "input", f"{where}: chain_of_thought") or CHAIN_OF_THOUGHT_INPUT,
        _string(parts, "target", f"{where}: chain_of_thought") or CHAIN_OF_THOUGHT_TARGET,
    )


def _translation(values: Mapping[str, Any], where: str) -> Literal["human", "machine"] | None:
    given = values.get("translation")
    if given not in (None, *TRANSLATIONS.values()):
        raise TemplateError(f"{where}: translation={given!r} is not one of human, machine.")
    return given


def _own_choices(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise TemplateError(f"{where}: answer_choices={value!r} is neither a list nor a Jinja expression.")
    for choice in value:
        if isinstance(choice, bool) or not isinstance(choice, str | int | float):
            raise TemplateError(f"{where}: the answer choice {choice!r} is not a string; put it in quotes.")
        if SEPARATOR in str(choice):
            raise TemplateError(
                f"{where}: the answer choice {choice!r} holds {SEPARATOR!r}; list the choices one by one."
            )
    return f" {SEPARATOR} ".join(str(choice) for choice in value)


def _promptsource_template(entry: Any, values: Mapping[str, Any], uuid: str, source: str) -> Template:
    where = f"{source}: template {uuid}"
    if not isinstance(entry, Mapping):
        raise TemplateError(f"{where} is a {type(entry).__name__}; a template is a mapping with name and jinja.")
    name = _string(entry, "name", where, required=True)
    where = f"{source}: template {name!r}"
    entry = _known(entry, {"answer_choices", "id", "jinja", "metadata", "name", "reference"}, where)
    metadata = _known(
        entry.get("metadata") or {},
        {"choices_in_prompt", "languages", "metrics", "original_task"},
        f"{where}: metadata",
    )
    languages, metrics = _strings(metadata, "languages", where), _strings(metadata, "metrics", where)
    translated = LANGUAGE_SUFFIX.search(name)
    choices = _string(entry, "answer_choices", where)
    return Template(
        name=name,
        jinja=_string(entry, "jinja", where, required=True),
        # An empty expression is promptsource's other spelling of null.
        answer_choices=choices if choices.strip() else None,
        dataset=_string(values, "dataset", source) or None,
        config=_string(values, "subset", source) or None,
        language=translated[1] if translated else languages[0] if len(languages) == 1 else None,
        translation=TRANSLATIONS[translated[2]] if translated else None,
        metrics=metrics,
        choices_in_prompt=_boolean(metadata, "choices_in_prompt", where),
        original_task=_boolean(metadata, "original_task", where),
        truncate_characters=PROMPTSOURCE_TRUNCATION,
        source=source,
    )


def _known(values: Any, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TemplateError(f"{where} is a {type(values).__name__}, not a mapping.")
    for key in values:
        if key not in known:
            raise TemplateError(f"{where}: unknown key {key!r}, {nearest_names(str(key), known)}.")
    return values


def _string(values: Mapping[str, Any], key: str, where: str, *, required: bool = False) -> str:
    value = values.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value):
        raise TemplateError(f"{where}: {key}={value!r} is not a {'non-empty ' if required else ''}string.")
    return value


def _strings(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TemplateError(f"{where}: {key}={value!r} is not a list of strings.")
    return tuple(value)


def _boolean(values: Mapping[str, Any], key: str, where: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise TemplateError(f"{where}: {key}={value!r} is neither true nor false.")
    return value


def _positive(values: Mapping[str, Any], key: str, where: str) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise TemplateError(f"{where}: {key}={value!r} is not a positive number of characters.")
    return value
