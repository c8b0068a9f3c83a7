"""The process that renders: it reads requests on its standard input and answers on its standard output.

Templates come from strangers, so they run here, behind the sandbox of `environment.py` and behind limits that hold
even if the sandbox should not: no file, socket or process can be opened, the address space, the processor time and
the size of the output are bounded, and there is nothing in the environment worth reading. `sandbox.py` starts the
process, feeds it and kills it.

    frame      8 bytes, big-endian length; JSON in UTF-8
    request    {"limits": {...}}                                        once, at the start
               {"rows": [...], "ids": [...], "protect": [3, ...]}       no answer; the rows of the next renders, and
                                                                        the numbers of those that hold `|||`
               {"render": "name+options", "seed": 0, "only": [3, ...] or null, "styles": [1, ...] or null,
                "template": {...}}                                      template only on its first use; one style a row
    answer     {"ready": true}                                          to the limits
               {"records": [...], "undefined": {...}}                   one entry a row, see `render_row`; of all
                                                                        rows, or of those that are numbered in `only`
               {"refused": "reason", "row": 17}                         the template as a whole is refused
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from jinja2 import Template as JinjaTemplate
from jinja2.exceptions import SecurityError, UndefinedError

from megatron_xmtf.prompts.templates.environment import PromptEnvironment
from megatron_xmtf.prompts.templates.options import OptionStyle, with_options

__all__ = ["main", "read_frame", "render_row", "write_frame"]

SEPARATOR = "|||"
MARKERS = [chr(0xFDD0 + number) * len(SEPARATOR) for number in range(32)]
"""Stand-ins for `|||` inside a row's own text: code points that Unicode keeps free of characters for ever."""

MAX_ANSWER_CHARACTERS = 32_000_000
"""Inputs and targets of one answer in all, so that it fits the memory on both sides of the pipe."""

Outcome = list[Any]


class OutputLimitError(Exception):
    """A rendered text is longer than the limit."""


class CompiledTemplate:
    """A template's Jinja in one variant, compiled, with what follows the rendering."""

    def __init__(self, environment: PromptEnvironment, values: Mapping[str, Any]) -> None:
        def compiled(name: str) -> JinjaTemplate | None:
            return None if values[name] is None else environment.from_string(values[name])

        self.prompt: JinjaTemplate = environment.from_string(values["prompt"])
        self.choices = compiled("answer_choices")
        self.strip_connection: bool = values["strip_connection"]
        self.draw_name: str = values["draw_name"]
        """What draws follow from: the same in all variants, which so draw the same words."""
        self.styles = [OptionStyle("", heading, marker) for heading, marker in values["option_styles"]]
        """Styles of option lists; empty: the variant has no options."""
        self.letters: bool = values["letters"]
        self.places_options: bool = values["places_options"]
        self.rationale = compiled("rationale")
        """None: the variant has no chain of thought."""
        self.thought_input, self.thought_target = compiled("thought_input"), compiled("thought_target")


def render_row(
    template: CompiledTemplate,
    row: dict[str, Any],
    *,
    marker: str | None,
    style: OptionStyle | None,
    max_characters: int,
) -> Outcome:
    """Render one row.

    Args:    row: the template's variables, with `|||` in their text replaced by `marker` (None: there was none).
             style: of the list of options; None in a variant without.
    Returns: ["rendered", inputs, targets, choices or None], or ["blank", "", ""], ["no_input", "", ""],
             ["no_target", "", ""], ["no_option", "", ""] when the target is none of the options,
             ["no_rationale", "", ""], or ["malformed", reason, ""] when the number of separators is not one.
    """
    choices = None
    if template.choices is not None:
        text = _rendered(template.choices, row, max_characters)
        choices = [choice.strip() for choice in text.split(SEPARATOR)]
    block = style.block(choices) if style is not None and choices is not None else ""
    variables = {**row, "answer_choices": choices, "options_block": block}
    text = _rendered(template.prompt, variables, max_characters)
    if not text.strip():
        return ["blank", "", ""]
    parts = text.split(SEPARATOR)
    if len(parts) != 2:
        return ["malformed", f"renders {len(parts) - 1} separators {SEPARATOR!r}; exactly one is the rule", ""]
    if template.strip_connection:
        inputs, targets = parts[0].strip(), parts[1].strip()
    else:
        inputs, targets = parts[0].lstrip(), parts[1].rstrip()
    if not inputs.strip():
        return ["no_input", "", ""]
    if not targets.strip():
        return ["no_target", "", ""]
    if style is not None:
        if choices is None or targets not in choices:
            return ["no_option", "", ""]
        inputs = inputs if template.places_options else with_options(inputs, block)
        if template.letters:
            letters = style.letters(len(choices))
            targets, choices = letters[choices.index(targets)], letters
    if template.rationale is not None:
        rationale = _rendered(template.rationale, variables, max_characters).strip()
        if not rationale:
            return ["no_rationale", "", ""]
        assert template.thought_input is not None and template.thought_target is not None, "sent with the rationale"
        variables |= {"input": inputs, "target": targets, "rationale": rationale}
        inputs = _rendered(template.thought_input, variables, max_characters).strip()
        targets = _rendered(template.thought_target, variables, max_characters).strip()
        choices = None  # the target is no longer one of them
    if marker is not None:
        inputs, targets = inputs.replace(marker, SEPARATOR), targets.replace(marker, SEPARATOR)
        choices = choices and [choice.replace(marker, SEPARATOR) for choice in choices]
    return ["rendered", inputs, targets, choices]


def _rendered(template: JinjaTemplate, variables: Mapping[str, Any], max_characters: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > max_characters:
            raise OutputLimitError(f"renders more than {max_characters:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def protect_separators(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Replace `|||` in every string of a row by a marker that the row does not hold."""
    text = json.dumps(row, ensure_ascii=False)
    marker = next((marker for marker in MARKERS if marker not in text), None)
    if marker is None:
        raise ValueError(f"the row holds {SEPARATOR!r} and every code point that could stand for it")

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(SEPARATOR, marker)
        if isinstance(value, list):
            return [replaced(element) for element in value]
        if isinstance(value, dict):
            return {name: replaced(element) for name, element in value.items()}
        return value

    return replaced(row), marker


class Renderer:
    """The state between requests: the compiled templates and the rows at hand."""

    def __init__(self, limits: Mapping[str, Any]) -> None:
        self.limits = limits
        self.environment = PromptEnvironment()
        self.templates: dict[str, CompiledTemplate] = {}
        self.rows: list[tuple[dict[str, Any], str | None]] = []
        self.ids: list[str] = []

    def take_rows(self, rows: list[dict[str, Any]], ids: list[str], protect: list[int]) -> None:
        """Keep the rows for the renders to come; those numbered in `protect` hold separators of their own."""
        self.ids, self.rows = ids, [(row, None) for row in rows]
        for number in protect:
            self.rows[number] = protect_separators(rows[number])

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Render rows at hand with one template, within the limits; request and answer as in the module's docstring."""
        # An expression may be folded to a constant at compile time, so compiling is under the limit too.
        soft = int(time.process_time()) + 1 + self.limits["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        self.environment.undefined_names.clear()
        name, only, styles = request["render"], request["only"], request["styles"]
        numbers = range(len(self.rows)) if only is None else only
        records: list[Outcome] = []
        characters = 0
        try:
            if "template" in request:
                self.templates[name] = CompiledTemplate(self.environment, request["template"])
            template = self.templates[name]
            for place, number in enumerate(numbers):
                self.environment.begin(f"{request['seed']}\0{self.ids[number]}\0{template.draw_name}")
                style = None if styles is None else template.styles[styles[place]]
                records.append(self._record(template, number, style))
                characters += len(records[-1][1]) + len(records[-1][2])
                if characters > MAX_ANSWER_CHARACTERS:
                    raise OutputLimitError(
                        f"renders more than {MAX_ANSWER_CHARACTERS:,} characters on {len(records)} rows"
                    )
        except SecurityError as error:
            return {"refused": f"tries what templates may not do: {error}", "row": numbers[len(records)]}
        except OutputLimitError as error:
            return {"refused": f"breaks the output limit: {error}", "row": numbers[min(len(records), len(numbers) - 1)]}
        except MemoryError:
            records.clear()
            return {"refused": f"breaks the memory limit of {self.limits['memory_bytes'] >> 20} MiB", "row": None}
        return {"records": records, "undefined": dict(self.environment.undefined_names)}

    def _record(self, template: CompiledTemplate, number: int, style: OptionStyle | None) -> Outcome:
        row, marker = self.rows[number]
        limit = self.limits["output_characters"]
        try:
            return render_row(template, row, marker=marker, style=style, max_characters=limit)
        except (SecurityError, OutputLimitError, MemoryError):
            raise
        except Exception as error:  # whatever a template's expression can raise on a row; reported, never swallowed
            return ["failed", f"{type(error).__name__}: {error}"[:500], ""]


def lock_down(limits: Mapping[str, Any]) -> None:
    """Give up what rendering does not need, for good: files, sockets, processes, memory beyond the limit."""
    # What Jinja imports late must be there before the door closes: rendering once, and failing once, brings it in.
    environment = PromptEnvironment()
    for text in ("{{ 'a' | upper }}", "{{ missing.attribute }}"):
        try:
            environment.from_string(text).render()
        except UndefinedError:
            continue
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    # Nothing more can be opened: descriptors are numbered from 0, and those below the limit are in use.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def read_frame(stream: IO[bytes]) -> Any:
    """Read one frame; None at the end of the stream."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    return json.loads(stream.read(struct.unpack(">Q", header)[0]))


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Write one frame. Raises UnicodeEncodeError, with nothing written, when a text is not Unicode."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    stream.write(struct.pack(">Q", len(body)) + body)
    stream.flush()


def main() -> None:
    """Serve until the standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that prints may get between the frames.
    os.dup2(2, 1)
    limits = read_frame(requests)["limits"]
    renderer = Renderer(limits)
    lock_down(limits)
    write_frame(answers, {"ready": True})
    while (request := read_frame(requests)) is not None:
        if "rows" in request:
            renderer.take_rows(request["rows"], request["ids"], request["protect"])
            continue
        answer = renderer.render(request)
        try:
            write_frame(answers, answer)
        except UnicodeEncodeError as error:
            write_frame(answers, {"refused": f"renders a text that is not Unicode: {error.reason}", "row": None})
