"""The Jinja that prompt templates are written in: sandboxed, deterministic, with promptsource's additions.

    choice, random    one element, drawn by (seed, record id, template, number of the draw); nothing is left to chance
    most_frequent     the list of the elements that occur most often (annotators' votes)
    highlight         promptsource's mark-up of inserted text
    zip               Python's

A template can compute text and nothing else: reaching for an attribute that leads into the interpreter raises
`SecurityError` at once (plain Jinja's sandbox yields an empty string first). Undefined values render empty, as in
promptsource, and are counted by name, so that a misspelt field shows in the report. Limits on time, memory and
output are the business of `worker.py`.

Source: bigscience-workshop/promptsource, promptsource/templates.py (semantics; templates there run unsandboxed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import Environment, Undefined, nodes, pass_environment
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_xmtf.errors import TemplateError, nearest_names
from megatron_xmtf.prompts.rendering.draws import drawn_number

__all__ = ["PromptEnvironment", "check_syntax", "constant_text_before", "names_before", "names_in"]

MAX_TEMPLATE_CHARACTERS = 100_000
"""Longer templates are refused before they are parsed; the longest in promptsource has about 10,000."""


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """A sandboxed environment that renders one record at a time; `begin` names the record."""

    def __init__(self) -> None:
        self.undefined_names: Counter[str] = Counter()
        self._key = ""
        self._draws = 0
        super().__init__(autoescape=False, undefined=_counting_undefined(self.undefined_names))
        # Filler text from an unseeded generator.
        del self.globals["lipsum"]
        self.globals["zip"] = zip
        self.filters.update(choice=_choice, random=_choice, most_frequent=_most_frequent, highlight=_highlight)

    def begin(self, key: str) -> None:
        """Start a record: the draws of `choice` follow from `key` alone."""
        self._key, self._draws = key, 0

    def draw(self, count: int) -> int:
        """Return a number in [0, count), the same on every machine and Python for the same record."""
        number = drawn_number(self._key, str(self._draws))
        self._draws += 1
        return number % count

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse an unsafe attribute at once, whatever the template would do with the value."""
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is out of bounds for templates")


def _counting_undefined(names: Counter[str]) -> type[Undefined]:
    class CountingUndefined(Undefined):
        """An undefined value that renders empty and leaves its name in `names`."""

        __slots__ = ()

        def __str__(self) -> str:
            names[str(self._undefined_name)] += 1
            return ""

    return CountingUndefined


@pass_environment
def _choice(environment: Environment, items: Iterable[Any]) -> Any:
    assert isinstance(environment, PromptEnvironment), "the filter is registered in PromptEnvironment only"
    elements = list(items)
    if not elements:
        return environment.undefined(name="choice of an empty list")
    return elements[environment.draw(len(elements))]


def _most_frequent(items: Iterable[Any]) -> list[Any] | None:
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]] if counts else None


def _highlight(text: Any) -> str:
    return f"<span style='color: #F08080'>{text}</span>"


def check_syntax(text: str, *, where: str) -> None:
    """Parse a template without running any of it (constants are not folded either).

    Args:    where: what to name in the error, as "T.yaml: template 'cause': jinja".
    Raises:  TemplateError: too long, a syntax error, an unknown filter or test, a reference to another template.
    """
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError(
            f"{where} has {len(text):,} characters; a template may have {MAX_TEMPLATE_CHARACTERS:,}. "
            "Put long texts into the rows."
        )
    environment = PromptEnvironment()
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError as error:
        raise TemplateError(f"{where}, line {error.lineno}: {error.message}.") from error
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise TemplateError(f"{where} cannot be parsed: {type(error).__name__}: {error}.") from error
    for node in tree.find_all((nodes.Filter, nodes.Test, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        if isinstance(node, nodes.Filter | nodes.Test):
            known = environment.filters if isinstance(node, nodes.Filter) else environment.tests
            if node.name not in known:
                kind = type(node).__name__.lower()
                raise TemplateError(
                    f"{where}, line {node.lineno}: no {kind} {node.name!r}; {nearest_names(node.name, known)}."
                )
        else:
            kind = type(node).__name__.lower()
            raise TemplateError(f"{where}, line {node.lineno}: {kind!r} is refused; a template stands for itself.")


def names_in(text: str) -> set[str]:
    """Return the variables that a template reads from outside (not its loops' or macros' own).

    Only the syntax tree is looked at: Jinja's own `meta` generates code, and folds constants as it does, which may
    take for ever (`9 ** (9 ** 9)`).
    """
    names = list(PromptEnvironment().parse(text).find_all(nodes.Name))
    return {name.name for name in names if name.ctx == "load"} - {name.name for name in names if name.ctx != "load"}


def names_before(text: str, separator: str | None, *, until: str | None = None) -> set[str]:
    """Return the names in a template's expressions up to the separator, or up to the name `until`.

    "{{ premise }} {% if a == 1 %}...{% endif %} ||| {{ b }}"  ->  {"premise", "if", "a", "endif"}
    """
    names: set[str] = set()
    for kind, value in _tokens_before(text, separator):
        if kind == "name" and value == until:
            break
        if kind == "name":
            names.add(value)
    return names


def constant_text_before(text: str, separator: str) -> str:
    """Return what a template says itself up to the separator: text, and the strings that it inserts."""
    said, inserting = [], False
    for kind, value in _tokens_before(text, separator):
        inserting = kind == "variable_begin" or (inserting and kind != "variable_end")
        if kind == "data" or (kind == "string" and inserting):
            said.append(value)
    return "".join(said)


def _tokens_before(text: str, separator: str | None) -> Iterator[tuple[str, str]]:
    for _, kind, value in PromptEnvironment().lex(text):
        if kind == "data" and separator is not None and separator in value:
            yield kind, value.partition(separator)[0]
            return
        yield kind, value
