"""Facts against values that anybody can check, and against the trap in babel's shared dictionaries."""

import subprocess
import sys

import pytest

from megatron_xmtf.quickstart.cldr import CONTINENT_OF_COUNTRY, LANGUAGES, load_facts, more_english_countries


@pytest.fixture(scope="module")
def facts():
    return {language: load_facts(language) for language in LANGUAGES}


def test_forty_six_languages_with_everything(facts) -> None:
    assert len(facts) == len(set(LANGUAGES)) == 46
    for own in facts.values():
        assert (len(own.months), len(own.days)) == (12, 7)
        assert len(own.countries) == len(own.currencies) == len(own.country_rows) == 24
        assert len(own.continents) == 4
        names = [*own.months, *own.days, *own.countries.values(), *own.currencies.values()]
        assert all(name == " ".join(name.split()) and name for name in names)


def test_known_names(facts) -> None:
    assert facts["en"].months[0] == "January" and facts["en"].days[0] == "Monday"
    assert facts["fr"].months[2] == "mars" and facts["fr"].days[:2] == ("lundi", "mardi")
    assert facts["fr"].countries["JP"] == "Japon" and facts["fr"].currencies["JP"] == "yen japonais"
    assert facts["zh"].continents["142"] == "亚洲" and facts["zh"].english_name == "Chinese"
    assert facts["ru"].months[0] == "январь"  # the nominative, not "января"
    assert ("Japan", "Asia", "Japanese Yen") in facts["en"].country_rows
    assert ("Russian", "Cyrillic") in facts["en"].scripts and ("ヒンディー語", "デーバナーガリー文字") in facts[
        "ja"
    ].scripts
    assert facts["fr"].units[3:5] == ("1 jour", "1 semaine") and facts["sw"].units[3] == "siku 1"


def test_no_language_gets_the_months_of_the_one_before(facts) -> None:
    """babel alone gives Azerbaijani months to every language asked later that inherits them by alias."""
    code = (
        "from megatron_xmtf.quickstart.cldr import load_facts\n"
        "for language in ('id', 'sw', 'hi'): print(load_facts(language).months[0], load_facts(language).days[0])"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert fresh[:3] == [f"{facts[name].months[0]} {facts[name].days[0]}" for name in ("id", "sw", "hi")]
    assert len({facts[name].months for name in ("id", "sw", "hi", "az") if name in facts}) == 3


def test_countries_are_spread_evenly_over_continents() -> None:
    counts = [list(CONTINENT_OF_COUNTRY.values()).count(region) for region in set(CONTINENT_OF_COUNTRY.values())]
    assert counts == [6, 6, 6, 6]


def test_more_english_countries(facts) -> None:
    rows = more_english_countries(100)
    assert len(rows) == 100 and len({row[0] for row in rows}) == 100
    assert {("Greece", "Europe", "Euro"), ("Chile", "Americas", "Chilean Peso")} <= set(rows)
    assert "Spain" not in {row[0] for row in rows}  # its time zones are on two continents
    assert not {row[0] for row in rows} & set(facts["en"].countries.values())
    assert more_english_countries(3) == rows[:3]
