r"""What stands around and between the exemplars of a few-shot prompt.

    name               input          target         separator
    blank_lines                       \n\n           \n\n\n        Flan's default
    lines                             \n             \n\n
    hashes                            \n             \n###\n
    arrow                             \n=>_          \n\n
    inline                            _              \n\n
    question_answer    Q:_            \nA:_          \n\n
    question_answer_words  Question:_ \nAnswer:_     \n\n
    input_output       Input:_        \nOutput:_     \n\n

    question_answer, one exemplar:   Q: 2+2?
                                     A: 4
                                                        (separator)
                                     Q: 3+4?
                                     A:                 the prompt ends here; its target is "7"

Styles with words are drawn only for prompts worded in English that bring no cue of their own ("Question: ...",
"... Answer:"); otherwise a style without words is drawn. Behind a cue at the end of a prompt stands white space alone,
and `inline` stands behind nothing else.
Source:  google-research/FLAN, flan/v2/few_shot.py (`x_y_delimiter`, `inputs_prefix`, `targets_prefix`,
`example_separator`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.prompts.rendering.draws import drawn_number
from megatron_xmtf.prompts.templates.cues import begins_with_cue, ends_in_cue

__all__ = ["DELIMITERS", "DelimiterStyle", "declared_delimiters", "drawn_delimiter", "few_shot_input"]


@dataclass(frozen=True)
class DelimiterStyle:
    """Texts before an input, before its target, and after the target."""

    name: str
    input: str
    target: str
    separator: str

    @property
    def worded(self) -> bool:
        """Whether any of the texts is in some language."""
        return any(character.isalpha() for character in self.input + self.target + self.separator)

    def exemplar(self, inputs: str, targets: str) -> str:
        """Return one exemplar, with the separator behind it."""
        return f"{self.input}{inputs}{self.target}{targets}{self.separator}"

    def question(self, inputs: str) -> str:
        """Return the prompt proper, up to where its target follows."""
        return f"{self.input}{inputs}{self.target}".rstrip()


def few_shot_input(exemplars: Sequence[str], inputs: str, style: DelimiterStyle) -> str:
    """Put exemplars (with their separators) and the prompt proper together."""
    return "".join(exemplars) + style.question(inputs)


def drawn_delimiter(
    styles: Sequence[DelimiterStyle], inputs: str, *, language: str | None, key: tuple[str, ...]
) -> DelimiterStyle:
    """Draw the style of one record.

    Args:    styles: what to draw from; if all have words, all suit. language: of the template; None counts as English.
             key: what the draw follows from, beside whether words suit the prompt.
    """
    cue = ends_in_cue(inputs)
    words_suit = language in (None, "en") and not begins_with_cue(inputs) and not cue
    # Where nothing is left, the caller's styles are all of one kind, chosen for the templates at hand.
    fitting = [style for style in styles if (style.target.isspace() if cue else style.target != " ")] or styles
    fitting = [style for style in fitting if words_suit or not style.worded] or fitting
    return fitting[drawn_number(*key, "delimiter") % len(fitting)]


DELIMITERS = (
    DelimiterStyle("blank_lines", "", "\n\n", "\n\n\n"),
    DelimiterStyle("lines", "", "\n", "\n\n"),
    DelimiterStyle("hashes", "", "\n", "\n###\n"),
    DelimiterStyle("arrow", "", "\n=> ", "\n\n"),
    DelimiterStyle("inline", "", " ", "\n\n"),
    DelimiterStyle("question_answer", "Q: ", "\nA: ", "\n\n"),
    DelimiterStyle("question_answer_words", "Question: ", "\nAnswer: ", "\n\n"),
    DelimiterStyle("input_output", "Input: ", "\nOutput: ", "\n\n"),
)


def declared_delimiters(values: Sequence[str | dict[str, str]] | None, *, where: str) -> list[DelimiterStyle]:
    """Return the styles that a job names, or declares as {input, target, separator}; None: all of the table.

    Raises:  ConfigError: an unknown name or key, no target or separator.
    """
    if values is None:
        return list(DELIMITERS)
    known = {style.name: style for style in DELIMITERS}
    styles = []
    for value in values:
        if isinstance(value, str):
            if value not in known:
                raise ConfigError(f"{where}: no delimiters are named {value!r}; {nearest_names(value, known)}.")
            styles.append(known[value])
        elif not (value.get("target") and value.get("separator")) or set(value) - {"input", "target", "separator"}:
            raise ConfigError(f"{where}: delimiters of one's own are {{input, target, separator}}, not {value!r}.")
        else:
            styles.append(DelimiterStyle("own", value.get("input", ""), value["target"], value["separator"]))
    return styles
