"""Variants: the ways in which a template is posed, as in Flan.

    name              prompt                                        target
    plain             as the template says                          as the template says
    3shot             three exemplars, then the prompt              unchanged
    options           the prompt and a list of the answer choices   unchanged
    letters           the prompt and a lettered list                the letter of the choice
    cot               the template's chain_of_thought.input         the rationale, then the answer
    3shot+letters+cot all of these                                  in this order

The name of a posed template is the template's with that of the variant behind a plus: `cause_or_effect+3shot+options`
(of `plain`, the template's alone), so that a mixture can select by `*+cot`.

A variant that a template has nothing for is not made of it: a chain of thought without a rationale, options without
answer choices, or of choices that the prompt shows anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.prompts.rendering.draws import drawn_number
from megatron_xmtf.prompts.templates.delimiters import DELIMITERS, DelimiterStyle
from megatron_xmtf.prompts.templates.options import OPTION_STYLES, OptionStyle
from megatron_xmtf.prompts.templates.template import Template

__all__ = ["PLAIN", "PosedTemplate", "Variant", "parse_variant", "pose_templates"]

NAME = re.compile(r"^(?:(?P<shots>[1-9][0-9]?)shot)?\+?(?P<options>options|letters)?\+?(?P<cot>cot)?$")


@dataclass(frozen=True)
class Variant:
    """One way of posing a template."""

    shots: int = 0
    """Exemplars before the prompt; at most 99."""
    options: Literal["options", "letters"] | None = None
    chain_of_thought: bool = False

    @property
    def name(self) -> str:
        """`plain`, or the parts joined by plus."""
        parts = [f"{self.shots}shot" if self.shots else "", self.options or "", "cot" if self.chain_of_thought else ""]
        return "+".join(part for part in parts if part) or "plain"


PLAIN = Variant()


@dataclass(frozen=True)
class PosedTemplate:
    """A template in one variant, with the styles that its records draw from."""

    template: Template
    variant: Variant = PLAIN
    option_styles: tuple[OptionStyle, ...] = ()
    """Of lists of options; empty: the variant has none."""
    delimiters: tuple[DelimiterStyle, ...] = DELIMITERS

    @property
    def name(self) -> str:
        """What records call the template."""
        return self.template.name if self.variant == PLAIN else f"{self.template.name}+{self.variant.name}"

    def drawn_option_style(self, row_id: str, *, seed: int) -> int:
        """Return which of `option_styles` a row draws: the same in all variants with these styles."""
        return drawn_number(str(seed), row_id, self.template.name, "options") % len(self.option_styles)

    def to_worker(self) -> dict[str, Any]:
        """Return what the rendering process needs; `worker.CompiledTemplate` reads it."""
        template, thought = self.template, self.variant.chain_of_thought
        return {
            "draw_name": template.name,
            "prompt": template.prompt_jinja,
            "answer_choices": template.answer_choices,
            "strip_connection": template.strip_connection,
            "option_styles": [[style.heading, style.marker] for style in self.option_styles],
            "letters": self.variant.options == "letters",
            "places_options": template.places_options,
            "rationale": template.rationale if thought else None,
            "thought_input": template.chain_of_thought_input if thought else None,
            "thought_target": template.chain_of_thought_target if thought else None,
        }


def parse_variant(name: str) -> Variant:
    """Read a variant's name.

    Raises:  ConfigError: not such a name.
    """
    if name == PLAIN.name:
        return PLAIN
    found = NAME.match(name)
    if found is not None:
        options: Literal["options", "letters"] | None = None
        if found["options"] is not None:
            options = "letters" if found["options"] == "letters" else "options"
        variant = Variant(int(found["shots"] or 0), options, found["cot"] is not None)
        if variant.name == name:
            return variant
    raise ConfigError(
        f"variant {name!r} is not plain, nor one or more of <k>shot, options or letters, cot in this order, joined "
        "by +, as 3shot+options+cot."
    )


def pose_templates(
    templates: Iterable[Template],
    variants: Sequence[Variant],
    *,
    option_styles: Sequence[OptionStyle] = OPTION_STYLES,
    delimiters: Sequence[DelimiterStyle] = DELIMITERS,
) -> tuple[list[PosedTemplate], dict[str, str]]:
    """Pose every template in every variant that applies to it.

    Returns: the posed templates, template by template; and why the others were not made, by their names.
    Raises:  ConfigError: letters are asked for, and no style has any.
    """
    posed, left_out = [], {}
    for template in templates:
        for variant in variants:
            styles = _fitting(option_styles, template, variant) if variant.options else ()
            one = PosedTemplate(template, variant, styles, tuple(delimiters))
            reason = _why_not(template, variant)
            if reason is None:
                posed.append(one)
            else:
                left_out[one.name] = reason
    return posed, left_out


def _why_not(template: Template, variant: Variant) -> str | None:
    if variant.chain_of_thought and template.rationale is None:
        return "the template has no rationale"
    if variant.options and template.answer_choices is None:
        return "the template has no answer choices"
    if variant.options and template.lists_choices and not template.places_options:
        return "the prompt shows the answer choices already"
    return None


def _fitting(styles: Sequence[OptionStyle], template: Template, variant: Variant) -> tuple[OptionStyle, ...]:
    """Return the styles that suit the variant and the template's language."""
    if variant.options == "letters":
        styles = [style for style in styles if style.lettered]
        if not styles:
            raise ConfigError("option_styles has no style with letters or numbers, which variant `letters` needs.")
    without_words = tuple(style for style in styles if not style.worded)
    # Styles with words alone have been chosen for the language by whoever offers them.
    return tuple(styles) if template.language in (None, "en") or not without_words else without_words
