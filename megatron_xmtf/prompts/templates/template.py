"""A prompt template, whichever form it was written in; `template_files.py` reads the forms.

template    input, `|||`, target; answer choices; for chain of thought a rationale and how it joins the answer
row         {"premise": "My eyes became red.", "question": "cause", "choice1": "I cried.", "choice2": "I laughed.",
             "label": 0}
inputs      My eyes became red. Why?
targets     I cried.
choices     ["I cried.", "I laughed."]     choice_index 0
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_xmtf.errors import TemplateError, nearest_names
from megatron_xmtf.prompts.templates.environment import check_syntax, constant_text_before, names_before, names_in

__all__ = ["CHAIN_OF_THOUGHT_INPUT", "CHAIN_OF_THOUGHT_TARGET", "SEPARATOR", "Template", "select_templates"]

SEPARATOR = "|||"
CHAIN_OF_THOUGHT_INPUT = "{{ input }}"
CHAIN_OF_THOUGHT_TARGET = "{{ rationale }}\n{{ target }}"
OPTIONS_BLOCK = "options_block"
"""Variable of a template's input that stands for the list of options; empty in variants without it."""


@dataclass(frozen=True)
class Template:
    """One prompt template."""

    name: str
    jinja: str
    """Input, `|||`, target."""
    answer_choices: str | None = None
    """Jinja that renders the choices, separated by `|||`; None: open generation."""
    dataset: str | None = None
    config: str | None = None
    language: str | None = None
    """Language that the prompt is worded in; None where the file does not say."""
    translation: Literal["human", "machine"] | None = None
    """How the prompt came into its language; None: written in it, or not known."""
    task: str | None = None
    metrics: tuple[str, ...] = ()
    choices_in_prompt: bool | None = None
    original_task: bool | None = None
    strip_connection: bool = True
    truncate_characters: int | None = None
    rationale: str | None = None
    """Jinja of the reasoning that leads to the target; None: the template has no chain of thought."""
    chain_of_thought_input: str = CHAIN_OF_THOUGHT_INPUT
    """Jinja over the rendered `input` (and the row) that is the input of a chain of thought."""
    chain_of_thought_target: str = CHAIN_OF_THOUGHT_TARGET
    """Jinja over the rendered `rationale` and `target` (and the row), in this order."""
    source: str = "memory"
    """The file, for error messages."""

    @property
    def prompt_jinja(self) -> str:
        """The Jinja that is rendered, with the truncation written into it."""
        if self.truncate_characters is None:
            return self.jinja
        # `-}}` and `+}}` control white space and stay at the end; promptsource's own replacement breaks them.
        cut = rf" | string | truncate({self.truncate_characters}) \1}}}}"
        return re.sub(rf"(?<!{OPTIONS_BLOCK})(?<!{OPTIONS_BLOCK} )([-+]?)}}}}", cut, self.jinja)

    @cached_property
    def places_options(self) -> bool:
        """Whether the input says itself where the list of options goes."""
        return OPTIONS_BLOCK in names_before(self.jinja, SEPARATOR)

    @cached_property
    def lists_choices(self) -> bool:
        """Whether the prompt shows its answer choices without any option: as the metadata says, else by its text.

        The text shows them when the input inserts `answer_choices`, or all the fields that they are made of, or says
        all the constant ones.
        """
        if self.answer_choices is None or self.choices_in_prompt is not None:
            return self.choices_in_prompt is True
        names = names_before(self.jinja, SEPARATOR)
        made_of = names_in(self.answer_choices)
        if "answer_choices" in names:
            return True
        if made_of:
            return made_of <= names
        text = constant_text_before(self.jinja, SEPARATOR).casefold()
        choices = [choice.strip().casefold() for choice in self.answer_choices.split(SEPARATOR)]
        return all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text) for choice in choices)

    def check(self) -> None:
        """Parse all of the Jinja; none of it is run.

        Raises:  TemplateError: a syntax error, no separator, a chain of thought that does not put the rationale
                 before the answer.
        """
        where = f"{self.source}: template {self.name!r}"
        if SEPARATOR not in self.jinja:
            raise TemplateError(f"{where} has no {SEPARATOR!r} between input and target.")
        check_syntax(self.jinja, where=where)
        if self.truncate_characters is not None:
            cut = f"{where} with the truncation to {self.truncate_characters} characters written in"
            check_syntax(self.prompt_jinja, where=cut)
        if self.answer_choices is not None:
            check_syntax(self.answer_choices, where=f"{where}: answer_choices")
        if self.rationale is not None:
            check_syntax(self.rationale, where=f"{where}: rationale")
            check_syntax(self.chain_of_thought_input, where=f"{where}: chain_of_thought.input")
            check_syntax(self.chain_of_thought_target, where=f"{where}: chain_of_thought.target")
            self._check_order(where)

    def _check_order(self, where: str) -> None:
        if "input" not in names_in(self.chain_of_thought_input):
            raise TemplateError(f"{where}: chain_of_thought.input does not insert {{{{ input }}}}, the prompt itself.")
        # Everything up to the first mention of the target: no text is the separator here.
        names = names_before(self.chain_of_thought_target, None, until="target")
        if "target" not in names_in(self.chain_of_thought_target) or "rationale" not in names:
            raise TemplateError(
                f"{where}: chain_of_thought.target must insert {{{{ rationale }}}} and after it {{{{ target }}}}: "
                "reasoning that follows its answer explains nothing."
            )


def select_templates(templates: Iterable[Template], names: Iterable[str]) -> list[Template]:
    """Return the templates of these names, in the order of the file.

    Raises:  TemplateError: no template of a name; names the nearest.
    """
    by_name = {template.name: template for template in templates}
    wanted = set(names)
    for name in sorted(wanted - set(by_name)):
        raise TemplateError(f"no template is named {name!r}; {nearest_names(name, by_name)}.")
    return [template for name, template in by_name.items() if name in wanted]
