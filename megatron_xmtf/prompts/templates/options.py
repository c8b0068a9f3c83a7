"""Lists of answer options as they stand in a prompt, and the letters that stand for them.

    name             list of [yes, no]                     letter of "no"
    dash             OPTIONS:  / - yes   / - no            (none)
    parentheses      OPTIONS:  / (A) yes / (B) no          (B)
    choices_dash     Choices:  / - yes   / - no            (none)
    choices_dot      Choices:  / A. yes  / B. no           B
    number           Options:  / 1. yes  / 2. no           2
    bare_dash        - yes   / - no                        (none)
    bare_parentheses (A) yes / (B) no                      (B)
    bare_dot         A. yes  / B. no                       B
    bare_bracket     A) yes  / B) no                       B
    bare_number      1. yes  / 2. no                       2

The first two are Flan's; the bare ones have no English word and suit prompts in any language.
Source:  google-research/FLAN, flan/v2/preprocessors.py (`format_options`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.prompts.templates.cues import split_closing_cue

__all__ = ["OPTION_STYLES", "OptionStyle", "declared_option_styles", "with_options"]

MARKER = re.compile(r"^(?P<before>[^A-Za-z0-9]*)(?P<first>[A1])(?P<after>[^A-Za-z0-9]*)$")


@dataclass(frozen=True)
class OptionStyle:
    """How a list of options looks."""

    name: str
    heading: str
    """Line above the list; empty: none."""
    marker: str
    """What stands before the first option: `A` and `1` in it count on; without them it is the same on every line."""

    @property
    def lettered(self) -> bool:
        """Whether each option has a letter or number of its own."""
        return MARKER.match(self.marker) is not None

    @property
    def worded(self) -> bool:
        """Whether the heading is in some language."""
        return any(character.isalpha() for character in self.heading)

    def markers(self, count: int) -> list[str]:
        """Return the markers of `count` options."""
        found = MARKER.match(self.marker)
        if found is None:
            return [self.marker] * count
        counted = [_letter(number) if found["first"] == "A" else str(number + 1) for number in range(count)]
        return [f"{found['before']}{one}{found['after']}" for one in counted]

    def letters(self, count: int) -> list[str]:
        """Return the letters that are given as answers: `(A)` with both its parentheses, else bare (`A`, `1`)."""
        found = MARKER.match(self.marker)
        assert found is not None, f"style {self.name!r} has no letters; `lettered` says so"
        if found["before"]:
            return self.markers(count)
        return [marker.removesuffix(found["after"]) for marker in self.markers(count)]

    def block(self, choices: list[str]) -> str:
        """Return the list of the choices."""
        lines = [f"{marker} {choice}" for marker, choice in zip(self.markers(len(choices)), choices, strict=True)]
        return "\n".join([self.heading, *lines] if self.heading else lines)


def _letter(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    letters = ""
    while number >= 0:
        number, rest = divmod(number, 26)
        letters, number = chr(ord("A") + rest) + letters, number - 1
    return letters


def with_options(inputs: str, block: str) -> str:
    """Put a list of options behind a prompt, before a last line that is a cue.

    "Is it true?"            ->  "Is it true?" / list
    "Is it true?" / "Answer:"  ->  "Is it true?" / list / "Answer:"
    """
    body, cue = split_closing_cue(inputs)
    return f"{body.rstrip()}\n{block}\n{cue}" if cue else f"{inputs.rstrip()}\n{block}"


OPTION_STYLES = (
    OptionStyle("dash", "OPTIONS:", "-"),
    OptionStyle("parentheses", "OPTIONS:", "(A)"),
    OptionStyle("choices_dash", "Choices:", "-"),
    OptionStyle("choices_dot", "Choices:", "A."),
    OptionStyle("number", "Options:", "1."),
    OptionStyle("bare_dash", "", "-"),
    OptionStyle("bare_parentheses", "", "(A)"),
    OptionStyle("bare_dot", "", "A."),
    OptionStyle("bare_bracket", "", "A)"),
    OptionStyle("bare_number", "", "1."),
)


def declared_option_styles(values: Sequence[str | dict[str, str]] | None, *, where: str) -> list[OptionStyle]:
    """Return the styles that a job names, or declares as {heading, marker}; None: all of the table.

    Raises:  ConfigError: an unknown name or key, no marker.
    """
    if values is None:
        return list(OPTION_STYLES)
    known = {style.name: style for style in OPTION_STYLES}
    styles = []
    for value in values:
        if isinstance(value, str):
            if value not in known:
                raise ConfigError(f"{where}: no option style is named {value!r}; {nearest_names(value, known)}.")
            styles.append(known[value])
        elif not value.get("marker") or set(value) - {"heading", "marker"}:
            raise ConfigError(f"{where}: an option style of one's own is {{heading, marker}}, not {value!r}.")
        else:
            styles.append(OptionStyle("own", value.get("heading", ""), value["marker"]))
    return styles
