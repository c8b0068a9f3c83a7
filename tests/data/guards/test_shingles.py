"""Stretches of units against the plain Python oracle."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data.guards.shingles import PADDING, Size, hash_stretches, is_in, shingles
from megatron_xmtf.data.guards.text_units import split_units
from tests.data.guards import brute_force

MIXED = st.lists(st.sampled_from(["one", "two", "3", "苹", "果", "ไ", "ท", "ย", "あ", "+"]), max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(MIXED, max_size=4), st.integers(1, 5), st.integers(1, 12))
def test_stretches_are_those_of_the_oracle(texts: list[str], count: int, characters: int) -> None:
    units = split_units(texts)
    found = hash_stretches(units, Size(count, characters))
    expected = []
    for number, text in enumerate(texts):
        for start, stop, wording in brute_force.stretches(brute_force.units(text), count, characters):
            expected.append((number, units.offsets[number] + start, units.offsets[number] + stop, wording))
    assert list(zip(found.texts, found.starts, found.ends, strict=True)) == [row[:3] for row in expected]
    wording_of: dict[int, str] = {}
    for value, (_, _, _, wording) in zip(found.hashes.tolist(), expected, strict=True):
        assert wording_of.setdefault(value, wording) == wording
    assert len(wording_of) == len({row[3] for row in expected})


@settings(max_examples=200, deadline=None)
@given(st.lists(MIXED, max_size=4))
def test_shingles_are_those_of_the_oracle(texts: list[str]) -> None:
    found = shingles(split_units(texts))
    expected = [(number, wording) for number, text in enumerate(texts) for _, _, wording in brute_force.shingles(text)]
    assert found.texts.tolist() == [number for number, _ in expected]
    same = {(a, b) for a, x in enumerate(found.hashes) for b, y in enumerate(found.hashes) if x == y}
    assert same == {(a, b) for a, x in enumerate(expected) for b, y in enumerate(expected) if x[1] == y[1]}


def test_equal_wording_is_equal_wherever_it_stands() -> None:
    alone = hash_stretches(split_units(["吃了3个苹果"]), Size(3, 6)).hashes
    within = hash_stretches(split_units(["他 yesterday 吃了3个苹果 and more"]), Size(3, 6)).hashes
    assert len(alone) and set(alone.tolist()) <= set(within.tolist())


def test_even_one_word_has_shingles_and_nothing_has_none() -> None:
    found = shingles(split_units(["a", "", "?", "b"]))
    assert found.texts.tolist() == [0, 0, 0, 3, 3, 3]
    assert found.starts.tolist() == [0, 1, 2, 13, 14, 15]
    assert PADDING == 2
    assert not set(found.hashes[:3].tolist()) & set(found.hashes[3:].tolist())


def test_is_in() -> None:
    values = np.array([1, 5, 9, 2**64 - 1], np.uint64)
    assert is_in(values, np.array([1, 9], np.uint64)).tolist() == [True, False, True, False]
    assert is_in(values, np.empty(0, np.uint64)).tolist() == [False] * 4
