"""Exact keys, and MinHash bands against their probability."""

import numpy as np

from megatron_xmtf.data.guards.fingerprints import BANDS, ROWS, band_keys, exact_keys, text_hashes
from megatron_xmtf.data.guards.text_units import split_units


def keys(*examples: tuple[str, str]) -> list[int]:
    texts = [text for example in examples for text in example]
    return exact_keys(text_hashes(split_units(texts), texts)).tolist()


def test_equal_keys_are_equal_examples() -> None:
    same = keys(("Is it raining?", "Yes."), (" is it  RAINING", "yes"), ("Is it. Raining", "YES"))
    assert len(set(same)) == 1
    different = keys(
        ("a b", "c"), ("a", "b c"), ("b a", "c"), ("c", "a b"), ("a b c", ""), ("", "a b c"), ("a a b", "c")
    )
    assert len(set(different)) == 7


def test_texts_of_punctuation_alone_are_told_apart() -> None:
    found = keys(("?!", "a"), ("?", "a"), (" ?! ", "a"), ("", "a"), (" ", "a"))
    assert found[0] == found[2] and found[3] == found[4]
    assert len(set(found)) == 3


def sets_of_similarity(generator: np.random.Generator, count: int, shared: int, own: int) -> list[np.ndarray]:
    """Return 2 * count sets; neighbours share `shared` members and have `own` each besides."""
    sets = []
    for _ in range(count):
        values = generator.integers(0, 2**63, shared + 2 * own, dtype=np.uint64)
        sets += [values[: shared + own], np.concatenate([values[:shared], values[shared + own :]])]
    return sets


def test_bands_are_shared_as_often_as_the_docstring_says() -> None:
    generator = np.random.default_rng(0)
    for shared, own in ((30, 35), (40, 20), (80, 10), (90, 5)):
        similarity = shared / (shared + 2 * own)
        sets = sets_of_similarity(generator, 1500, shared, own)
        offsets = np.cumsum([0] + [len(values) for values in sets])
        found = band_keys(np.concatenate(sets), offsets, np.zeros(len(sets), np.uint64))
        share = float((found[:, 0::2] == found[:, 1::2]).any(axis=0).mean())
        expected = 1 - (1 - similarity**ROWS) ** BANDS
        assert abs(share - expected) < 0.04, f"similarity {similarity}: {share} of pairs share a band, not {expected}"
    table = {0.3: 0.03, 0.5: 0.36, 0.7: 0.92, 0.8: 0.996, 0.85: 0.9996}
    for similarity, probability in table.items():
        assert abs(1 - (1 - similarity**ROWS) ** BANDS - probability) < 0.005


def test_order_repeats_and_neighbours_do_not_change_bands_but_salts_do() -> None:
    values = np.arange(1, 40, dtype=np.uint64) ** np.uint64(7)
    sets = [values, values[::-1], np.concatenate([values, values[:5]]), values[:0], values[:1], values]
    offsets = np.cumsum([0] + [len(part) for part in sets])
    found = band_keys(np.concatenate(sets), offsets, np.array([1, 1, 1, 1, 1, 2], np.uint64))
    assert (found[:, 0] == found[:, 1]).all() and (found[:, 0] == found[:, 2]).all()
    assert not found[:, 3].any() and found[:, [0, 1, 2, 4, 5]].all()
    assert not (found[:, 0] == found[:, 5]).any()
