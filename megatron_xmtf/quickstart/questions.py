"""Questions for finetuning (English alone) and for evaluation (all languages), as rows for the prompt templates.

    task       item      answer         choices (the answer and three others of the same list and language)
    next       mars      avril          avril, janvier, août, mai
    before     mars      février        février, juin, …
    continent  Japon     Asie           Asie, Afrique, Europe, Amériques
    currency   Japon     yen japonais   yen japonais, rouble russe, …

    dataset          language  what the finetuning saw
    trained_items    en        the very questions
    held_out_items   en        the prompts, but no question or answer about these items' own facts
    zero_shot        others    the prompts, but nothing in this language

A question of `zero_shot` whose item and answer are spelled as in a question of the finetuning is left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_xmtf.quickstart.cldr import CONTINENT_OF_COUNTRY, CountryRow, LanguageFacts
from megatron_xmtf.quickstart.texts import ENGLISH_LISTS

__all__ = ["NUM_CHOICES", "TASKS", "Question", "evaluation_questions", "training_questions"]

TASKS = ("next", "before", "continent", "currency")
NUM_CHOICES = 4
HELD_OUT_MONTHS = frozenset({2, 6, 9, 11})
"""Positions of March, July, October and December."""
HELD_OUT_DAYS = frozenset({1, 4})
"""Positions of Tuesday and Friday."""
HELD_OUT_COUNTRIES = frozenset("BR ET HU IN MX NG RU TH".split())
"""Two of each continent."""


@dataclass(frozen=True)
class Question:
    """A row of the templates."""

    id: str
    task: str
    dataset: str
    """`trained_items`, `held_out_items` or `zero_shot`; see the module."""
    language: str
    item: str
    answer: str
    choices: tuple[str, ...]
    """In random order."""

    def to_row(self) -> dict[str, Any]:
        """Return it as it stands in a jsonl file."""
        return {**asdict(self), "choices": list(self.choices)}


@dataclass(frozen=True)
class _Fact:
    item: str
    answer: str
    others: tuple[str, ...]
    """Wrong answers of the same list."""
    held_out: bool


def training_questions(english: LanguageFacts, more_rows: Sequence[CountryRow], *, seed: int) -> list[Question]:
    """Return the questions of the finetuning: English, without the held-out items.

    Args:    more_rows: further countries, which the evaluation does not ask about. seed: of the choices.
    """
    generator = random.Random(seed)
    questions = []
    for task in TASKS:
        facts = [fact for fact in _facts(english, task) if not fact.held_out] + list(_more_facts(task, more_rows))
        questions += _questions(facts, task=task, dataset="trained_items", language="en", generator=generator)
    return questions


def evaluation_questions(
    facts: Mapping[str, LanguageFacts], training: Sequence[Question], *, questions_per_language: int, seed: int
) -> list[Question]:
    """Return the questions of the evaluation, by task, then language.

    Args:    training: what the finetuning asks. questions_per_language: at most so many of each task in each
             language but English, drawn at random; in English all are asked. seed: of draws and choices.
    """
    generator = random.Random(seed)
    trained = {(question.task, question.item, question.answer) for question in training}
    questions: list[Question] = []
    for task in TASKS:
        for language, own in facts.items():
            asked = list(_facts(own, task))
            if language == "en":
                for dataset, held_out in (("trained_items", False), ("held_out_items", True)):
                    chosen = [fact for fact in asked if fact.held_out is held_out]
                    questions += _questions(chosen, task=task, dataset=dataset, language="en", generator=generator)
                continue
            unseen = [fact for fact in asked if (task, fact.item, fact.answer) not in trained]
            chosen = generator.sample(unseen, min(questions_per_language, len(unseen)))
            questions += _questions(chosen, task=task, dataset="zero_shot", language=language, generator=generator)
    return questions


def _facts(own: LanguageFacts, task: str) -> Iterator[_Fact]:
    """Yield what a task can ask in one language."""
    if task in ("next", "before"):
        for items, held_out in ((own.months, HELD_OUT_MONTHS), (own.days, HELD_OUT_DAYS)):
            yield from _list_facts(items, task, held_out)
        return
    column = 1 if task == "continent" else 2
    rows = own.country_rows
    answers = list(dict.fromkeys(row[column] for row in rows))
    for code, row in zip(CONTINENT_OF_COUNTRY, rows, strict=True):
        yield _Fact(row[0], row[column], _without(answers, row[column]), code in HELD_OUT_COUNTRIES)


def _more_facts(task: str, more_rows: Sequence[CountryRow]) -> Iterator[_Fact]:
    """Yield what only the English finetuning asks."""
    if task in ("next", "before"):
        for items in ENGLISH_LISTS:
            yield from _list_facts(items, task, frozenset())
        return
    column = 1 if task == "continent" else 2
    answers = list(dict.fromkeys(row[column] for row in more_rows))
    for row in more_rows:
        yield _Fact(row[0], row[column], _without(answers, row[column]), False)


def _list_facts(items: Sequence[str], task: str, held_out: frozenset[int]) -> Iterator[_Fact]:
    """Yield each item with its neighbour; behind the last comes the first."""
    step = 1 if task == "next" else -1
    for position, item in enumerate(items):
        answer = items[(position + step) % len(items)]
        yield _Fact(item, answer, _without(items, item, answer), position in held_out)


def _without(items: Sequence[str], *excluded: str) -> tuple[str, ...]:
    return tuple(item for item in items if item not in excluded)


def _questions(
    facts: Sequence[_Fact], *, task: str, dataset: str, language: str, generator: random.Random
) -> list[Question]:
    questions = []
    for number, fact in enumerate(facts):
        others = generator.sample(fact.others, min(NUM_CHOICES - 1, len(fact.others)))
        choices = generator.sample([fact.answer, *others], len(others) + 1)
        name = f"{task}/{dataset}/{language}/{number}"
        questions.append(Question(name, task, dataset, language, fact.item, fact.answer, tuple(choices)))
    return questions
