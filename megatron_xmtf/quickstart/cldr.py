"""Facts in 46 languages out of the Unicode CLDR, through `babel`: no download, no hub.

    language  months[2]  days[0]   countries["JP"]  currencies["JP"]  continents["142"]
    en        March      Monday    Japan            Japanese Yen      Asia
    fr        mars       lundi     Japon            yen japonais      Asie
    zh        三月        星期一     日本              日元               亚洲

Source:  Unicode CLDR as shipped by `babel` (Unicode licence), https://cldr.unicode.org.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTINENT_OF_COUNTRY", "LANGUAGES", "CountryRow", "LanguageFacts", "load_facts", "more_english_countries"]

LANGUAGES: tuple[str, ...] = tuple(
    (
        # 26 of the languages that BLOOM was pretrained on and CLDR covers well,
        "en ar as bn ca es eu fr gu hi id ig kn ml mr ne pa pt sw ta te ur vi yo zh zu "
        # and 20 more, so that every large script and family is there.
        "af am cs de el fa fi ha hu it ja ko nl pl ro ru sv th tr uk"
    ).split()
)
"""CLDR codes, English first. 46, as many as the corpus of BLOOM has; some of those have too little in CLDR."""

CONTINENT_OF_COUNTRY: Mapping[str, str] = {
    **dict.fromkeys("CZ HU PL RU SE UA".split(), "150"),
    **dict.fromkeys("CN ID IN JP TH VN".split(), "142"),
    **dict.fromkeys("EG ET GH KE NG ZA".split(), "002"),
    **dict.fromkeys("AR BR CA MX PE US".split(), "019"),
}
"""ISO 3166 country -> UN M.49 region: Europe 150, Asia 142, Africa 002, Americas 019.
Six of each, so that every continent is right equally often; each country has a currency of its own."""

REGION_OF_ZONE = {"Europe": "150", "Asia": "142", "Africa": "002", "America": "019"}
"""First part of a time zone's name -> UN M.49 region."""

UNITS = ("second", "minute", "hour", "day", "week", "month", "year")
"""Units of time that a list goes through, the shortest first."""

TABLES = ("months", "days", "territories", "languages", "scripts", "currency_names", "unit_patterns")
LONGEST_ENGLISH_NAME = 20
"""Characters; longer country names of the additional English rows are left out."""

CountryRow = tuple[str, str, str]
"""Names of a country, its continent and its currency, in one language."""


@dataclass(frozen=True)
class LanguageFacts:
    """What CLDR calls some things in one language. Mappings are keyed by ISO 3166 codes of countries."""

    language: str
    """CLDR code."""
    english_name: str
    """What English calls the language."""
    months: tuple[str, ...]
    """12 names, January first, in the form that stands alone (nominative)."""
    days: tuple[str, ...]
    """7 names, Monday first."""
    countries: Mapping[str, str]
    """Name of each country of `CONTINENT_OF_COUNTRY`."""
    currencies: Mapping[str, str]
    """Name of the currency now in use there."""
    continents: Mapping[str, str]
    """UN M.49 region -> name."""
    scripts: tuple[tuple[str, str], ...]
    """(name of a language, name of the script that it is written in), for each of `LANGUAGES`."""
    units: tuple[str, ...]
    """One of each of `UNITS`, as in "1 hour"."""

    @property
    def country_rows(self) -> list[CountryRow]:
        """(country, continent, currency), in the order of `CONTINENT_OF_COUNTRY`."""
        return [
            (self.countries[code], self.continents[region], self.currencies[code])
            for code, region in CONTINENT_OF_COUNTRY.items()
        ]


def load_facts(language: str) -> LanguageFacts:
    """Read one language's names; within each kind they are all different.

    `babel` resolves an alias ("stand-alone months are the formatted ones") by writing the answer into a dictionary
    that languages share, so that the second language asked gets the first one's months. We resolve on a copy.

    Args:    language: one of `LANGUAGES`.
    """
    from babel import localedata
    from babel.core import get_global
    from babel.localedata import LocaleDataDict

    whole = localedata.load(language)
    data: Any = LocaleDataDict(copy.deepcopy({name: whole[name] for name in TABLES}))
    likely = get_global("likely_subtags")
    months, days = data["months"]["stand-alone"]["wide"], data["days"]["stand-alone"]["wide"]
    facts = LanguageFacts(
        language=language,
        english_name=localedata.load("en")["languages"][language],
        months=tuple(_plain(months[number]) for number in range(1, 13)),
        days=tuple(_plain(days[number]) for number in range(7)),
        countries={code: _plain(data["territories"][code]) for code in CONTINENT_OF_COUNTRY},
        currencies={code: _plain(data["currency_names"][_currency(code)]) for code in CONTINENT_OF_COUNTRY},
        continents={code: _plain(data["territories"][code]) for code in sorted(set(CONTINENT_OF_COUNTRY.values()))},
        scripts=tuple(
            # A likely subtag is spelled language_Script_TERRITORY, as in "ru_Cyrl_RU".
            (_plain(data["languages"][code]), _script(data["scripts"], likely[code].split("_")[1]))
            for code in LANGUAGES
        ),
        units=tuple(_one(data["unit_patterns"][f"duration-{unit}"]) for unit in UNITS),
    )
    for kind, names in (
        ("months", facts.months),
        ("days", facts.days),
        ("countries", facts.countries.values()),
        ("currencies", facts.currencies.values()),
        ("continents", facts.continents.values()),
        ("languages", [name for name, _ in facts.scripts]),
        ("units", facts.units),
    ):
        _require_different(names, f"{kind} of CLDR language {language}")
    return facts


def more_english_countries(count: int) -> list[CountryRow]:
    """Return rows of countries outside `CONTINENT_OF_COUNTRY`, in English: as in reality, English texts tell more.

    A country's continent is that of its time zones; one with zones on two of the four continents is left out.

    Args:    count: at most so many, in the order of their ISO 3166 codes.
    """
    from babel import localedata
    from babel.core import get_global
    from babel.numbers import get_territory_currencies

    english = localedata.load("en")
    continents = {code: english["territories"][code] for code in REGION_OF_ZONE.values()}
    regions: dict[str, set[str]] = {}
    for zone, country in get_global("zone_territories").items():
        regions.setdefault(country, set()).add(REGION_OF_ZONE.get(zone.split("/")[0], ""))
    rows = []
    for country in sorted(regions):
        name = english["territories"].get(country, "")
        region = "".join(regions[country])
        if country in CONTINENT_OF_COUNTRY or region not in continents or not get_territory_currencies(country):
            continue
        if len(name) <= LONGEST_ENGLISH_NAME and "&" not in name:
            rows.append((_plain(name), continents[region], _plain(english["currency_names"][_currency(country)])))
    return rows[:count]


def _currency(country: str) -> str:
    """Return the ISO 4217 code of the currency now in use in a country, the first if there are several."""
    from babel.numbers import get_territory_currencies

    return str(get_territory_currencies(country)[0])


def _script(names: Mapping[str, str], code: str) -> str:
    """Name a script; one that a language has no own word for goes by its ISO 15924 code, as CLDR's root has it."""
    return _plain(names.get(code, code))


def _one(widths: Mapping[str, Mapping[str, str]]) -> str:
    """Fill a unit's pattern, such as "{0} hour", with 1.

    Args:    widths: "long" and "short" -> plural form -> pattern. What the long ones lack is as in the short ones, and
             a language without a singular has "other" alone.
    """
    patterns = {**widths.get("narrow", {}), **widths.get("short", {}), **widths.get("long", {})}
    return _plain(patterns.get("one", patterns["other"]).format(1))


def _plain(name: str) -> str:
    """Turn CLDR's non-breaking spaces into spaces: they would only make other tokens of the same words."""
    return " ".join(name.split())


def _require_different(names: Iterable[str], what: str) -> None:
    names = list(names)
    assert len(set(names)) == len(names), f"{what}: two have one name in {names}"
