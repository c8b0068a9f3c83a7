"""Cut texts into the units that guards compare: words, and single characters where a script has no spaces.

    text        "Der  Zug, 10:30!"      "我有3个apple。"              "ร้อน"
    units       der zug 10 30           我 有 3 个 apple             ร้ อ น
    kinds       W   W   W  W            I  I  W I  W                 L  L  L      word, ideograph, letter

Normalised first: NFKC, case folded, digits of every script as 0-9, invisible format characters removed. Punctuation,
control characters and white space only separate; symbols (+ = $, emoji) are units of their own. A character unit
keeps its combining marks. A unit is known by a 64-bit hash: two different ones agree by chance once in 2**64 pairs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["IDEOGRAPH", "LETTER", "SYMBOL", "WORD", "Units", "mix", "normalise", "range_hashes", "split_units"]

LETTERS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo, extended
    (0x31F0, 0x31FF),  # Katakana, small letters
    (0xA9E0, 0xA9FF),  # Myanmar, extended
    (0xAA60, 0xAA7F),
    (0x1B000, 0x1B16F),  # Kana, supplements
)
"""First and last code points of letters of scripts written without spaces between words."""
IDEOGRAPHS = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),  # iteration mark, closing mark, zero
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),  # compatibility
    (0x20000, 0x323AF),  # extensions
)
"""The same of Han, where a character is half a word rather than a sound."""
BOUNDARY = "\x1e"
"""Stands after each of several texts that are cut together: a control character."""
SEPARATOR, SYMBOL, WORD, LETTER, IDEOGRAPH, MARK, IGNORED = range(7)
CASELESS_I = {0x131: 0x69}
"""Dotless i as i: Turkish text loses the difference when its case is changed by a program that knows no Turkish."""
IGNORED_MARKS = (0x307, *range(0xFE00, 0xFE10))
"""The dot that remains of a folded capital dotted I, and variation selectors."""
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2**64."""


@dataclass(frozen=True)
class Units:
    """The units of several texts, one text after another."""

    hashes: NDArray[np.uint64]
    """[units]."""
    kinds: NDArray[np.uint8]
    """[units], SYMBOL, WORD, or for a single character LETTER or IDEOGRAPH."""
    offsets: NDArray[np.int64]
    """[texts + 1], first unit of each text."""
    codes: NDArray[np.uint32]
    """Code points of the normalised texts."""
    spans: NDArray[np.int64]
    """[units, 2], where each unit begins and ends in `codes`."""

    def merged(self, count: int) -> Units:
        """Return the same units with every `count` texts that follow one another taken as one."""
        return Units(self.hashes, self.kinds, self.offsets[::count], self.codes, self.spans)

    def wording(self, start: int, stop: int) -> str:
        """Return the normalised text of units `start` up to `stop`."""
        codes = self.codes[self.spans[start, 0] : self.spans[stop - 1, 1]]
        return codes.tobytes().decode("utf-32-le", "replace")


def normalise(text: str) -> str:
    """Apply NFKC and case folding; NFKC again, since folding may take composed letters apart."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def split_units(texts: Sequence[str]) -> Units:
    """Normalise texts and cut them into units, all in one go."""
    # One by one: a text that is normal already, as nearly all are, is recognised without being rewritten.
    normal = [normalise(text) for text in texts]
    joined = BOUNDARY.join([*normal, ""])
    if joined.count(BOUNDARY) != len(texts):
        joined = "".join(text.replace(BOUNDARY, " ") + BOUNDARY for text in normal)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    class_of, folded = _tables()
    classes = class_of[codes]
    seen = classes != IGNORED
    codes, classes = folded[codes[seen]], classes[seen]
    classes, is_mark = _attach_marks(classes)
    begins = (classes == SYMBOL) | (classes == LETTER) | (classes == IDEOGRAPH)
    begins &= ~is_mark
    words = classes == WORD
    begins[:1] |= words[:1]
    begins[1:] |= words[1:] & ~words[:-1]
    breaks = np.flatnonzero(begins | (classes == SEPARATOR))
    at = np.flatnonzero(begins[breaks])
    spans = np.stack([breaks[at], breaks[at + 1]], axis=1) if len(at) else np.zeros((0, 2), np.int64)
    ends = np.flatnonzero(codes == ord(BOUNDARY))
    assert len(ends) == len(texts), f"{len(ends)} boundaries for {len(texts)} texts"
    offsets = np.concatenate([[0], np.searchsorted(spans[:, 0], ends)]).astype(np.int64)
    hashes = mix(range_hashes(mix(codes.astype(np.uint64)), spans[:, 0], spans[:, 1]))
    return Units(hashes, classes[spans[:, 0]], offsets, codes, spans)


def _attach_marks(classes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Give each combining mark the class of its base; one without a letter before it separates."""
    is_mark = classes == MARK
    if not is_mark.any():
        return classes, is_mark
    base = np.where(is_mark, 0, np.arange(len(classes)))
    np.maximum.accumulate(base, out=base)
    attached = classes[base]
    attached[is_mark & ((attached == SYMBOL) | (attached == MARK))] = SEPARATOR
    return attached, is_mark


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers, one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def range_hashes(values: NDArray[np.uint64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash values[start:end] for each pair: equal stretches of values have equal hashes wherever they stand.

    sum(values[start + k] * BASE**k) modulo 2**64, as the difference of two running sums divided by BASE**start.
    """
    powers, inverses = _powers(max(len(values), 1).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return (sums[ends] - sums[starts]) * inverses[starts]


@cache
def _powers(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return BASE**k and its inverse modulo 2**64 for k below 2**bits."""
    tables = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        values = np.full(1 << bits, base, np.uint64)
        values[0] = 1
        tables.append(np.cumprod(values))
    return tables[0], tables[1]


@lru_cache(maxsize=1)
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Return the class of every code point, and what it is folded to."""
    class_of = np.zeros(0x110000, np.uint8)
    folded = np.arange(0x110000, dtype=np.uint32)
    for start, stop in ((0, 0x20000), (0x20000, 0x323B0), (0xE0000, 0xE0200)):
        for code in range(start, stop):
            character = chr(code)
            class_of[code] = _class(unicodedata.category(character))
            digit = unicodedata.decimal(character, None)
            if digit is not None:
                folded[code] = ord("0") + digit
    for blocks, kind in ((LETTERS, LETTER), (IDEOGRAPHS, IDEOGRAPH)):
        for first, last in blocks:
            part = class_of[first : last + 1]
            part[(part == WORD) & (folded[first : last + 1] >= 128)] = kind
    class_of[list(IGNORED_MARKS)] = IGNORED
    for code, other in CASELESS_I.items():
        folded[code] = other
    return class_of, folded


def _class(category: str) -> int:
    if category == "Cf":
        return IGNORED
    if category in ("Sm", "Sc", "So"):
        return SYMBOL
    return {"L": WORD, "N": WORD, "M": MARK}.get(category[0], SEPARATOR)
