"""Choose the templates that word a language's rows: English ones (xP3), localised ones (xP3mt), or both.

rows      prompts      templates of the files            chosen
zho_Hans  english      ask (en), ask_zhmt (zh), old (-)  ask, old     no language means English
zho_Hans  localised                                      ask_zhmt
zho_Hans  both                                           ask, old, ask_zhmt
quy_Latn  localised                                      none: an error, or the English ones, or no record at all
eng_Latn  localised                                      ask, old              English is the language of the rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts.templates.template import Template

__all__ = ["ChosenTemplates", "choose_templates", "named_templates", "prompt_language_of"]

ENGLISH = "en"


@dataclass(frozen=True)
class ChosenTemplates:
    """The templates for the rows of one language."""

    templates: list[Template]
    missing: bool
    """No localised template was found, and English ones or none stand in."""


def prompt_language_of(language: str) -> str:
    """Return the code that templates have for a language of rows: CLDR's short one (`zho_Hans` -> `zh`)."""
    from babel.core import get_global

    base = language.replace("-", "_").partition("_")[0].lower()
    short: str = get_global("language_aliases").get(base, base)
    return short.partition("_")[0]


def named_templates(templates: Sequence[Template], *, include: Sequence[str], exclude: Sequence[str]) -> list[Template]:
    """Return the templates whose names match one of `include` and none of `exclude` (`*` stands for anything)."""
    return [
        template
        for template in templates
        if any(fnmatchcase(template.name, pattern) for pattern in include)
        and not any(fnmatchcase(template.name, pattern) for pattern in exclude)
    ]


def choose_templates(
    english: Sequence[Template],
    localised: Sequence[Template],
    *,
    prompts: Literal["english", "localised", "both"],
    prompt_language: str,
    missing: Literal["error", "english", "skip"],
    translation: Literal["any", "human", "machine"],
    where: str,
) -> ChosenTemplates:
    """Choose among the templates of an entry's files.

    Args:    english, localised: of the file of English templates and that of the language; they may be the same.
             where: what to name in an error.
    Raises:  TemplateError: the language has no localised template and `missing` is "error"; there is no English one
             where one is asked for.
    """
    in_english = [template for template in english if template.language in (None, ENGLISH)]
    if prompt_language == ENGLISH:
        in_language = in_english
    else:
        in_language = [template for template in localised if template.language == prompt_language]
        if translation != "any":
            in_language = [template for template in in_language if template.translation == translation]
    lacking = prompts != "english" and not in_language
    if lacking and missing == "error":
        kind = "template" if translation == "any" else f"template translated by {translation}"
        raise TemplateError(
            f"{where}: no {kind} is worded in {prompt_language!r}, so nothing is rendered; give the code that the "
            "templates have (languages: {row_code: prompt_code}), or say missing: english (English ones are taken) or "
            "missing: skip (the language is left out)."
        )
    wants_english = prompts != "localised" or (lacking and missing == "english")
    if wants_english and not in_english:
        raise TemplateError(
            f"{where}: no template is worded in English; name a file of them under templates: {{english: ...}}."
        )
    chosen = list(in_english) if wants_english else []
    if prompts != "english":
        chosen += [template for template in in_language if template not in chosen]
    return ChosenTemplates(chosen, lacking)
