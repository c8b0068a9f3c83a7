"""Encode texts piece by piece with a bounded memory of pieces, to the same ids as the tokenizer gives whole texts.

Prompted data says the same words over and over: the template in every record of its template, a row's fields under
every template. A text is cut where `segment_rule` proves that no token lies across, and each segment is looked up:

    "Is it so?"   ->   "Is" | " it" | " so?"   ->   [3792] ++ [340] ++ [523, 30]   ->   ids as one bytes object

Segments that are not known are collected over all texts of a call and encoded at once. The way of most texts is
`split(" ")`, one dict lookup a part, `join`; that is sound because a dict of parts holds regular ones only, between
any two of which the text may be cut. Other parts are first joined with their neighbours ("a", "", "b" -> "a", "  b").
A text with a segment in which an added token stands (`</s>` typed in a text) is encoded whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.segment_rule import SPACE_MARK, NoSegments, SegmentRule

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer

__all__ = ["SegmentEncoder"]

MEMORY_BYTES = 256 << 20
"""Taken at most by what one encoder remembers, in two generations; about a million words."""
ENTRY_BYTES = 104
"""A dict entry: 24 bytes, its share of an index that is at most two thirds full, and room to grow by doubling."""
ANCHOR = "a"
"""A word before a segment that is encoded by itself, where the start of a text differs from other places."""
BATCH_TEXTS = 32
"""Texts whose unknown segments are encoded at once: few, so that a row under its next template is known."""
WHOLE_TEXT_CHARACTERS = 256
"""Longest text that is remembered where texts are not cut."""
COMBINING_FROM = "\u0300"
"""No character below it joins its neighbour to one grapheme, but CR LF, which is never beside a cut."""
UNKNOWN = object()


@dataclass
class _Table:
    """Segments of one kind -> their ids, or None: such a text is encoded whole."""

    young: dict[str, bytes | None] = field(default_factory=dict)
    old: dict[str, bytes | None] = field(default_factory=dict)
    """What was known when `young` was begun; looked at where `young` has nothing."""
    wanted: dict[str, None] = field(default_factory=dict)
    """Segments to be encoded, in the order of appearance."""


@dataclass
class _Start:
    """Segments at the start of a text, under one prefix."""

    heads: _Table = field(default_factory=_Table)
    odd: _Table = field(default_factory=_Table)


@dataclass
class _Incomplete:
    """A text of which a part was not found among the regular segments."""

    place: int
    """Among the texts of the call."""
    parts: list[str]
    found: list[bytes | None]
    """Ids of each part; those of joined parts are at the first of them, and nothing at the others."""
    holes: list[tuple[int, _Table, str]]
    """(Index in `found`, where the segment is remembered, the segment)."""


class SegmentEncoder:
    """Encode texts with one tokenizer; ids equal `backend.encode_batch_fast(texts, add_special_tokens=False)`."""

    def __init__(
        self, backend: Backend, rule: SegmentRule | NoSegments, *, dtype: np.dtype, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """Args: dtype: of the ids in the bytes returned, uint16 or int32. memory_bytes: of what is remembered."""
        self._backend = backend
        self._typecode, self._dtype = {"uint16": "H", "int32": "i"}[dtype.name], dtype
        self._generation_bytes, self._used_bytes = memory_bytes // 2, 0
        self._words, self._odd, self._lines, self._texts = _Table(), _Table(), _Table(), _Table()
        self._joined: dict[str, tuple[str, str]] = {}
        self._tails: dict[str, bytes] = {}
        self._starts: dict[str, _Start] = {}
        self._rule = rule if isinstance(rule, SegmentRule) else None
        if self._rule is not None:
            self._prepare(self._rule)

    def _prepare(self, rule: SegmentRule) -> None:
        added = {number: token.content for number, token in self._backend.get_added_tokens_decoder().items()}
        # The model itself makes the unknown token of what it does not know; only its written form is an added token.
        self._unknown_id = rule.unknown_id
        self._unknown_text = added.pop(rule.unknown_id, None) if rule.unknown_id is not None else None
        self._added_ids = frozenset(added)
        # A further cut must not part an added token.
        self._cuts_tails = bool(rule.tails) and not any(text.endswith(tuple(rule.tails)) for text in added.values())
        self._cuts_lines = rule.line_cut is not None and not any("\n" in text for text in added.values())
        self._lead = f"{ANCHOR} " if rule.start_differs else " "
        self._lead_ids = self._encode_all([ANCHOR])[0] if rule.start_differs else []
        self._borders = _Borders(self._backend.normalizer, both=rule.requires == "both") if rule.normalized else None
        plain = not rule.normalized and not rule.start_differs and "ByteLevel" in repr(self._backend.pre_tokenizer)
        self._token_bytes = _token_bytes(self._backend) if plain else None

    @property
    def remembered_bytes(self) -> int:
        """Return what is taken by the present generation; the one before takes no more than it did when it ended."""
        return self._used_bytes

    def encode(self, texts: Sequence[str], *, prefix: str = "") -> list[bytes]:
        """Return the ids of each text, `prefix` put before it, as bytes of the dtype."""
        self._forget_old()
        if self._rule is None:
            return self._encode_uncut([prefix + text for text in texts])
        encoded: list[bytes] = []
        for first in range(0, len(texts), BATCH_TEXTS):
            encoded += self._encode_batch(texts[first : first + BATCH_TEXTS], prefix)
        return encoded

    def _encode_batch(self, texts: Sequence[str], prefix: str) -> list[bytes]:
        head_ids = self._starts.setdefault(prefix, _Start()).heads.young.get
        word_ids = self._words.young.get
        encoded: list[bytes] = []
        append = encoded.append
        incomplete: list[_Incomplete] = []
        for text in texts:
            parts = text.split(" ")
            found = list(map(word_ids, parts))
            found[0] = head_ids(parts[0])
            if None in found:
                incomplete.append(_Incomplete(len(encoded), parts, found, []))
                append(b"")
            else:
                append(b"".join(found))  # type: ignore[arg-type]
        if incomplete:
            self._complete(incomplete, prefix, encoded)
        return encoded

    def _complete(self, texts: Sequence[_Incomplete], prefix: str, encoded: list[bytes]) -> None:
        """Encode what is not known of some texts, and put them together."""
        start = self._starts[prefix]
        for text in texts:
            self._find_holes(text, start, prefix)
        for table, is_head in ((start.heads, True), (start.odd, True), (self._words, False), (self._odd, False)):
            self._encode_wanted(table, prefix if is_head else self._lead, is_head=is_head)
        self._encode_wanted(self._lines, "", is_head=True)
        for key, (left, right) in self._joined.items():
            halves = self._words.young[left], self._lines.young[right]
            self._remember(self._words, key, None if None in halves else b"".join(halves))  # type: ignore[arg-type]
        self._joined = {}
        whole: dict[int, str] = {}
        for text in texts:
            found = text.found
            for index, table, key in text.holes:
                found[index] = table.young[key]
            if None in found:
                whole[text.place] = prefix + " ".join(text.parts)
            else:
                encoded[text.place] = b"".join(found)  # type: ignore[arg-type]
        for place, ids in zip(whole, self._encode_all(list(whole.values())), strict=True):
            encoded[place] = self._to_bytes(ids)

    def _find_holes(self, text: _Incomplete, start: _Start, prefix: str) -> None:
        """Say which segments a text lacks: regular parts, and irregular ones joined with their neighbours."""
        parts, found, rule = text.parts, text.found, self._rule
        assert rule is not None
        index = 0
        while True:
            try:
                index = found.index(None, index)
            except ValueError:
                return
            table, key = (self._words if index else start.heads), parts[index]
            if not self._is_known(table, key):
                if rule.is_regular(key) if index else rule.is_regular_head(prefix + key):
                    self._want(table, key)
                else:
                    index, behind = self._widen(index, text, prefix)
                    table, key = (self._odd if index else start.odd), " ".join(parts[index:behind])
                    found[index:behind] = [None] + [b""] * (behind - index - 1)
                    if not self._is_known(table, key):
                        table.wanted[key] = None
                    text.holes = [hole for hole in text.holes if hole[0] < index]
                    text.holes.append((index, table, key))
                    index = behind
                    continue
            text.holes.append((index, table, key))
            index += 1

    def _want(self, table: _Table, key: str) -> None:
        """Have a regular segment encoded, or made of parts that are known."""
        rule = self._rule
        assert rule is not None
        if table is not self._words:
            table.wanted[key] = None
            return
        if key in self._joined:
            return
        line = rule.split_line(key) if self._cuts_lines and "\n" in key else None
        if line is not None:
            left, right = line
            if not self._is_known(self._words, left):
                self._want(self._words, left)
            if not self._is_known(self._lines, right):
                self._lines.wanted[right] = None
            self._joined[key] = line
            return
        tail = rule.split_tail(key) if self._cuts_tails else None
        ids = self._words.young.get(tail[0]) if tail is not None else None
        if tail is None or ids is None:
            table.wanted[key] = None
            return
        if tail[1] not in self._tails:
            self._tails[tail[1]] = self._to_bytes(self._encode_all([tail[1]])[0])
        self._remember(table, key, ids + self._tails[tail[1]])

    def _widen(self, index: int, text: _Incomplete, prefix: str) -> tuple[int, int]:
        """Return the first part of the segment that an irregular part belongs to, and the one behind its last."""
        assert self._rule is not None
        parts = [prefix + text.parts[0], *text.parts[1:]]
        first, behind = index, index + 1
        while first and not self._rule.allows(parts[first - 1], parts[first]):
            first -= 1
        while behind < len(parts) and not self._rule.allows(parts[behind - 1], parts[behind]):
            behind += 1
        return first, behind

    def _is_known(self, table: _Table, key: str) -> bool:
        return key in table.wanted or self._recall(table, key) is not UNKNOWN

    def _recall(self, table: _Table, key: str) -> object:
        """Return a segment's ids, None or UNKNOWN; take it over from the old generation."""
        ids = table.young.get(key, UNKNOWN)
        if ids is UNKNOWN:
            ids = table.old.pop(key, UNKNOWN)
            if ids is not UNKNOWN:
                self._remember(table, key, ids)  # type: ignore[arg-type]
        return ids

    def _remember(self, table: _Table, key: str, ids: bytes | None) -> None:
        table.young[key] = ids
        self._used_bytes += getsizeof(key) + getsizeof(ids) + ENTRY_BYTES

    def _forget_old(self) -> None:
        """Begin a new generation when the present one is full: what is not used again meanwhile is forgotten."""
        if self._used_bytes <= self._generation_bytes:
            return
        starts = [table for start in self._starts.values() for table in (start.heads, start.odd)]
        for table in (self._words, self._odd, self._lines, self._texts, *starts):
            table.old, table.young = table.young, {}
        self._used_bytes = 0

    def _encode_wanted(self, table: _Table, lead: str, *, is_head: bool) -> None:
        wanted, table.wanted = list(table.wanted), {}
        if table is self._words and self._encode_joined(wanted):
            return
        lead_ids = [] if is_head else self._lead_ids
        for key, ids in zip(wanted, self._encode_all([lead + key for key in wanted]), strict=True):
            assert ids[: len(lead_ids)] == lead_ids, f"the tokenizer joins {ANCHOR!r} to what follows a space"
            text = lead + key if is_head else key
            whole = self._must_stay_whole(text, ids, is_head=is_head)
            self._remember(table, key, None if whole else self._to_bytes(ids[len(lead_ids) :]))

    def _encode_joined(self, words: Sequence[str]) -> bool:
        """Encode regular words as one text and part its ids where their bytes add up to those of the words.

            words  "it" "lies"    text " it lies"    ids  338  7363  ->  " it" 3 bytes | " l" 2, "ies" 3 bytes

        One text costs a fraction of many. It may be cut between any two of its words, so the ids are those of the words
        alone. Only where each token stands for bytes of its own (byte-level BPE); True if the words are remembered.
        """
        if self._token_bytes is None or not words:
            return False
        text = " " + " ".join(words)
        ids = np.array(self._encode_all([text])[0], np.int64)
        ends = np.cumsum(self._token_bytes[ids])
        wanted = np.cumsum([len(word.encode()) + 1 for word in words])
        cuts = np.searchsorted(ends, wanted)
        if len(ends) == 0 or ends[-1] != wanted[-1] or not np.array_equal(ends[cuts], wanted):
            return False  # an added token in the text, or one that is not its bytes: word by word tells which
        if not self._added_ids.isdisjoint(ids.tolist()):
            return False
        data, size, begin = ids.astype(self._dtype).tobytes(), self._dtype.itemsize, 0
        for word, end in zip(words, ((cuts + 1) * size).tolist(), strict=True):
            self._remember(self._words, word, data[begin:end])
            begin = end
        return True

    def _must_stay_whole(self, text: str, ids: list[int], *, is_head: bool) -> bool:
        """Tell whether a segment holds an added token, or its borders are not what they seem once normalised."""
        if not self._added_ids.isdisjoint(ids):
            return True
        borders, unknown = self._borders, self._unknown_text
        if unknown is not None and self._unknown_id in ids:
            if unknown in text or (borders is not None and unknown in borders.normalize(text)):
                return True
        return borders is not None and not borders.are_kept(text, is_head=is_head)

    def _encode_uncut(self, texts: Sequence[str]) -> list[bytes]:
        """Encode whole texts; short ones are remembered."""
        table = self._texts
        for text in texts:
            if text not in table.wanted and self._recall(table, text) is UNKNOWN:
                table.wanted[text] = None
        wanted, table.wanted = list(table.wanted), {}
        fresh = dict(zip(wanted, map(self._to_bytes, self._encode_all(wanted)), strict=True))
        for text, ids in fresh.items():
            if len(text) <= WHOLE_TEXT_CHARACTERS:
                self._remember(table, text, ids)
        return [fresh[text] if text in fresh else table.young[text] for text in texts]  # type: ignore[misc]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # a call costs tens of microseconds even then
            return []
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _to_bytes(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()


class _Borders:
    """What a normaliser makes of the first and the last character of a segment, beside the spaces around it."""

    def __init__(self, normalizer: Normalizer | None, *, both: bool) -> None:
        """Args: both: the first character matters too, not only the last."""
        self._normalizer, self._both = normalizer, both
        between = self.normalize(f"{ANCHOR} {ANCHOR}")
        self._before, self._behind = between[: -len(ANCHOR)], between[-len(ANCHOR) - 1 :]
        assert self._behind in (f" {ANCHOR}", f"{SPACE_MARK}{ANCHOR}"), "the normaliser takes spaces away"
        self._kept: dict[str, bool] = {}

    def normalize(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def are_kept(self, segment: str, *, is_head: bool) -> bool:
        """Tell whether a segment begins and ends with something other than a space after normalisation too."""
        borders = segment[:2] + segment[-1:]
        if borders and max(borders) < COMBINING_FROM:  # each border is a grapheme by itself
            return (is_head or not self._both or self._is_kept(segment[0])) and self._is_kept(segment[-1])
        return self._check(segment, is_head=is_head)

    def _is_kept(self, character: str) -> bool:
        kept = self._kept.get(character)
        if kept is None:
            kept = self._kept[character] = self._check(character, is_head=False)
        return kept

    def _check(self, segment: str, *, is_head: bool) -> bool:
        if is_head:
            whole, before = self.normalize(f"{segment} {ANCHOR}"), ""
        else:
            whole, before = self.normalize(f"{ANCHOR} {segment} {ANCHOR}"), self._before
        if not (whole.startswith(before) and whole.endswith(self._behind)):
            return False
        inner = whole[len(before) : -len(self._behind)]
        return bool(inner) and not _is_space(inner[-1]) and (is_head or not self._both or not _is_space(inner[0]))


def _token_bytes(backend: Backend) -> NDArray[np.int64]:
    """Return the number of bytes that each id of a byte-level vocabulary stands for: a letter of it is a byte."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    return sizes


def _is_space(character: str) -> bool:
    return character.isspace() or character == SPACE_MARK
