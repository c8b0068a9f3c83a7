"""Plain texts in 46 languages for the short pretraining: lists and tables, as such facts stand on web pages.

    list     mars, avril, mai, juin, …                      months, days or units of time, from any on, round and round
    table    Japon | Asie | yen japonais                     eight countries a text
    pair     Japon: yen japonais                             eight countries, one of the two columns
    script   russe | cyrillique                              eight languages and what they are written in

No text says what comes *before* an item, and none asks or answers a question: that is left to the finetuning.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping, Sequence

from megatron_xmtf.quickstart.cldr import CountryRow, LanguageFacts

__all__ = ["ENGLISH_LISTS", "pretraining_texts"]

ENGLISH_LISTS: tuple[tuple[str, ...], ...] = (
    tuple(string.ascii_uppercase),
    tuple(str(number) for number in range(1, 31)),
    tuple("Mon Tue Wed Thu Fri Sat Sun".split()),
    tuple(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu "
        "nu xi omicron pi rho sigma tau upsilon phi chi psi omega".split()
    ),
)
"""More ordered lists, told in English texts alone: as in reality, there is more to read in English."""

SEPARATORS = (", ", "\n ", " - ", ", ", " / ")
PAIR_SEPARATORS = (" | ", " - ", ": ")
LIST_LENGTH = 13
TABLE_LENGTH = 8
ENGLISH_SHARE = 4
"""Texts in English for each text in another language."""
ENGLISH_LIST_SHARE = 0.3
"""Part of the English texts that is taken by `ENGLISH_LISTS`."""
KINDS, KIND_WEIGHTS = ("list", "table", "pair", "script"), (8, 8, 2, 1)
LIST_WEIGHTS = (11, 8, 1)
"""Of lists of the 12 months, the 7 days and 7 units of time."""


def pretraining_texts(
    facts: Mapping[str, LanguageFacts], english_rows: Sequence[CountryRow], *, rounds: int, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield (language, text): every language once a round, English `ENGLISH_SHARE` times.

    Args:    facts: by language. english_rows: further countries that only English texts tell of.
             rounds: texts of each language. seed: the same texts for the same seed.
    """
    generator = random.Random(seed)
    languages = [language for language in facts for _ in range(ENGLISH_SHARE if language == "en" else 1)]
    for _ in range(rounds):
        for language in generator.sample(languages, len(languages)):
            own = facts[language]
            if language == "en" and generator.random() < ENGLISH_LIST_SHARE:
                yield language, _list_text(generator.choice(ENGLISH_LISTS), generator)
                continue
            [kind] = generator.choices(KINDS, KIND_WEIGHTS)
            if kind == "list":
                [items] = generator.choices((own.months, own.days, own.units), LIST_WEIGHTS)
                yield language, _list_text(items, generator)
            elif kind == "script":
                yield language, _rows_text(own.scripts, " | ", generator)
            else:
                rows = own.country_rows + (list(english_rows) if language == "en" else [])
                yield language, _table_text(rows, generator, pairs=kind == "pair")


def _list_text(items: Sequence[str], generator: random.Random) -> str:
    """Write out a list from a random item on, beginning again behind the last."""
    start = generator.randrange(len(items))
    length = min(LIST_LENGTH, len(items) + 1)
    return generator.choice(SEPARATORS).join(items[(start + offset) % len(items)] for offset in range(length))


def _table_text(rows: Sequence[CountryRow], generator: random.Random, *, pairs: bool) -> str:
    """Write out some rows, whole or (country, continent) or (country, currency) alone.

    Lines begin with a space, so that a name is the same tokens there as within a sentence.
    """
    if not pairs:
        return _rows_text(rows, " | ", generator)
    separator, column = generator.choice(PAIR_SEPARATORS), generator.choice((1, 2))
    return _rows_text([(row[0], row[column]) for row in rows], separator, generator)


def _rows_text(rows: Sequence[tuple[str, ...]], separator: str, generator: random.Random) -> str:
    chosen = generator.sample(list(rows), min(TABLE_LENGTH, len(rows)))
    return "\n".join(" " + separator.join(row) for row in chosen)
