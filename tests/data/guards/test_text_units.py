"""Units against a plain Python oracle and against what may not matter: case, punctuation, spacing, composition."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_xmtf.data.guards.text_units import IDEOGRAPH, LETTER, WORD, split_units
from tests.data.guards import brute_force

SCRIPTS = st.characters(
    codec="utf-8", categories=("L", "M", "N", "P", "S", "Z", "Cf", "Cc"), max_codepoint=0x31FF
) | st.sampled_from(
    "的一是不了人我在有他這中大来ไทยภาษากี่ำあいうエオ々〇々ー한국말ক্ষमहिंدىİıßﬁ①½²٣४៤\u200b\u200d\ufe0f\u0301"
)
TEXTS = st.text(SCRIPTS, max_size=20)


def words(text):
    units = split_units([text])
    return [units.wording(at, at + 1) for at in range(len(units.hashes))]


def hashes(text):
    return split_units([text]).hashes.tolist()


def test_examples_of_the_docstring() -> None:
    assert words("Der  Zug, 10:30!") == ["der", "zug", "10", "30"]
    assert words("我有3个apple。") == ["我", "有", "3", "个", "apple"]
    assert words("ร้อน") == ["ร้", "อ", "น"]
    kinds = split_units(["我有3个apple。ร้"]).kinds.tolist()
    assert kinds == [IDEOGRAPH, IDEOGRAPH, WORD, IDEOGRAPH, WORD, LETTER]


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("a\u0301\u0301 \u0301b +\u0301c")
@example("ก\u0301a\u0301ข")
@example("々〇〆々")
def test_units_are_those_of_the_oracle(text: str) -> None:
    expected = brute_force.units(text)
    assert words(text) == [unit for unit, _ in expected]
    kind_of = {0: (1, WORD), 2: (LETTER,), 3: (IDEOGRAPH,)}
    found = split_units([text]).kinds.tolist()
    assert all(kind in kind_of[factor] for kind, (_, factor) in zip(found, expected, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS | st.just("a\x1eb"), max_size=8))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]) -> None:
    together = split_units(texts)
    assert together.offsets.tolist() == np.cumsum([0] + [len(hashes(text)) for text in texts]).tolist()
    assert together.hashes.tolist() == [value for text in texts for value in hashes(text)]


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_hashes_are_equal_just_where_the_units_are(one: str, other: str) -> None:
    mine, theirs = split_units([one]), split_units([other])
    for a in range(len(mine.hashes)):
        for b in range(len(theirs.hashes)):
            assert (mine.hashes[a] == theirs.hashes[b]) == (mine.wording(a, a + 1) == theirs.wording(b, b + 1))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Straße, FIN", "STRASSE fin"),
        ("Iğdır ili", "IĞDIR İLİ"),
        ("café", unicodedata.normalize("NFD", "CAFÉ")),
        ("नमस्ते दुनिया", "नमस्ते\u200d — दुनिया!"),
        ("١٢٣ apples", "123 apples"),
        ("ＡＢＣ　１２３", "abc 123"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("这 是\n一 个 句子", "这是一个句子。"),
        ("กำ", "ก\u0e4d\u0e32"),
        ("“Don’t” stop—now", "don't stop - now"),
        ("soft\u00adhyphen", "softhyphen"),
    ],
)
def test_what_does_not_matter(text: str, same: str) -> None:
    assert hashes(text) == hashes(same)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("3 + 4", "3 - 4"),
        ("$5", "€5"),
        ("3.5", "35"),
        ("ab c", "a bc"),
        ("คน", "ค้น"),
        ("किताब", "कताब"),
        ("😀", "😢"),
        ("x>y", "x<y"),
    ],
)
def test_what_does(text: str, other: str) -> None:
    assert hashes(text) != hashes(other)


def test_no_text_and_no_units() -> None:
    assert split_units([]).offsets.tolist() == [0]
    assert split_units(["", "?!", "\ud800"]).offsets.tolist() == [0, 0, 0, 0]
