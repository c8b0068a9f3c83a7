"""Derive from a tokenizer's declaration where a text may be cut without changing one id.

A cut is made before a space only. It is allowed where no normaliser, pre-tokeniser or model of this kind looks or
joins across it, whatever stands on both sides; the last character before the cut and the first one behind the space
decide:

    declared                                      cut before a space when            "Yes, it is (I think)."
    GPT-2's regex; Llama 3's, Qwen's, GPT-4's     what precedes is no white space    Yes,| it| is| (I| think).
    BLOOM's regex                                 what precedes or what follows is   Yes,| it| is| (I| think).
                                                  none of `( ) | . , ! ?` ...        "so. (I" stays whole
    words after a space (T5, mT5, XLM-R)          both are letters, digits or marks  Yes,| it| is| (I| think).
                                                  that the normaliser leaves there
    no split, sentencepiece BPE (Llama 2)         the same, and no merge makes       Yes,| it| is| (I| think).
                                                  "x" + "_" (a piece that goes on behind a space)

Why the regexes allow it: every alternative takes a space as its first character or inside a run of white space only,
so that a match which holds what precedes has ended before the space; nothing looks behind; the one look-ahead,
`\\s+(?!\\S)`, is tried on white space only, and the cut parts no run of white space.
Inside a segment that is not known, BLOOM's and GPT-2's regexes allow two further cuts: a letter or digit and the
punctuation that ends the segment are never one token, and neither are what precedes a line end and the line end
(GPT-2), or a line end and a word behind it (BLOOM, where line ends and punctuation are).
Everything that is not listed here has no rule: such a tokenizer is given whole texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["NoSegments", "SegmentRule", "find_segment_rule"]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    CONTRACTIONS + WORDS + REST: "Qwen 2",
    CONTRACTIONS + WORDS + "{1,3}" + REST: "Llama 3 and GPT-4",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "GPT-2",
}
"""Patterns of pre-tokenisers whose matches hold a space only at their start or within white space -> whose they are."""
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
BLOOM_BETWEEN = "()|.,!?…。，、।۔،"
"""Characters beside white space that BLOOM's words do not hold; runs of them, with spaces, stay together."""
TAILS = '.,!?;:)]"'
"""Punctuation in every regex above, without the apostrophe, which may begin a contraction."""
BLOOM_TAILS = ".,!?)"
OLD_LETTERS = re.compile("[A-Za-z0-9À-ÖØ-öø-ɏА-яء-غف-يऄ-ह一-龥]")
"""Letters and digits to every version of Unicode; marks are none, the regexes join them with punctuation."""
SPACE_MARK = "▁"
"""What sentencepiece writes for a space."""
ODD_LETTERS = "\u0d4e\u0e33\u0eb3\uff9e\uff9f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
"""Letters and symbols that join their neighbour to one grapheme (Unicode TR29: Prepend, SpacingMark, Extend)."""


@dataclass(frozen=True)
class SegmentRule:
    """Where texts of one tokenizer may be cut."""

    name: str
    """Whose rule it is, for logs and manifests."""
    requires: Literal["end", "either", "both"]
    """Which side of a cut must be plain: what precedes, one of the two, or both."""
    excluded: str = ""
    """Characters beside white space that are not plain."""
    normalized: bool = False
    """The normaliser may change a border: plain are letters, digits, marks and symbols that stand by themselves."""
    start_differs: bool = False
    """A word at the start of a text gets other ids than behind a space."""
    tails: str = ""
    """Punctuation that is cut off from a letter or digit (`splits_tail`) when it ends a segment."""
    line_cut: Literal["before", "behind"] | None = None
    """Where a segment may be cut at a line end: before its first one, or behind its last one."""
    unknown_id: int | None = None
    """Id that the model gives to what it does not know."""

    def plain_end(self, text: str) -> bool:
        """Tell whether a text may end before a cut."""
        return bool(text) and self._plain(text[-1]) and not (self.normalized and _joins_next(text[-1]))

    def plain_start(self, text: str) -> bool:
        """Tell whether a text may begin behind the space of a cut."""
        return bool(text) and self._plain(text[0]) and not (self.normalized and _joins_previous(text[0]))

    def allows(self, before: str, behind: str) -> bool:
        """Tell whether a text may be cut between `before` and " " + `behind`."""
        if self.requires == "end":
            return self.plain_end(before)
        if self.requires == "either":
            return self.plain_end(before) or self.plain_start(behind)
        return self.plain_end(before) and self.plain_start(behind)

    def is_regular(self, part: str) -> bool:
        """Tell whether a part between two spaces may be cut off from all other regular parts, and last of all."""
        if self.requires == "end":
            return self.plain_end(part)
        if self.requires == "either":
            return self.plain_start(part)
        return self.plain_end(part) and self.plain_start(part)

    def is_regular_head(self, head: str) -> bool:
        """Tell whether a regular part may follow a text's start, up to its first space."""
        return self.requires == "either" or self.plain_end(head)

    def split_tail(self, segment: str) -> tuple[str, str] | None:
        """Cut punctuation off the end of a segment, "so." -> ("so", "."); None where there is none to be cut off."""
        base = segment.rstrip(self.tails) if self.tails else segment
        if len(base) in (0, len(segment)) or not OLD_LETTERS.match(base[-1]):
            return None
        return base, segment[len(base) :]

    def split_line(self, segment: str) -> tuple[str, str] | None:
        """Cut a segment at a line end, "so.\\n\\nWhy" -> ("so.", "\\n\\nWhy"); None where that is not allowed."""
        if self.line_cut == "before":
            place = segment.find("\n")
            return (segment[:place], segment[place:]) if place > 0 and self.plain_end(segment[:place]) else None
        if self.line_cut == "behind":
            place = segment.rfind("\n") + 1
            inside = 0 < place < len(segment) and self.plain_start(segment[place:])
            return (segment[:place], segment[place:]) if inside else None
        return None

    def _plain(self, character: str) -> bool:
        # U+180E was a space until Unicode 6.3.
        return not (character.isspace() or character == "\u180e" or character in self.excluded)


@dataclass(frozen=True)
class NoSegments:
    """A tokenizer whose texts are not cut."""

    reason: str


def find_segment_rule(content: Mapping[str, Any]) -> SegmentRule | NoSegments:
    """Find the rule of a tokenizer, given as the content of its tokenizer.json in today's form."""
    rule, model = _find_rule(content), content["model"]
    if isinstance(rule, NoSegments):
        return rule
    unknown = model.get("unk_token")
    unknown_id = model.get("unk_id") if unknown is None else dict(model["vocab"]).get(unknown)
    return replace(rule, unknown_id=unknown_id)


def _find_rule(content: Mapping[str, Any]) -> SegmentRule | NoSegments:
    model = content["model"]
    reason = _refused_tokens(content.get("added_tokens") or []) or _refused_normalizer(content.get("normalizer"))
    if reason is None and model.get("dropout"):
        reason = "its model drops merges at random"
    if reason is not None:
        return NoSegments(reason)
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    normalized = content.get("normalizer") is not None
    if kinds in (["ByteLevel"], ["Split", "ByteLevel"]) and model.get("type", "BPE") == "BPE":
        return _byte_level_rule(steps, normalized=normalized)
    if kinds in (["WhitespaceSplit"], ["Metaspace"], ["WhitespaceSplit", "Metaspace"]) and (
        "WhitespaceSplit" in kinds or steps[-1].get("split", True)
    ):
        return SegmentRule("words", "both", excluded=SPACE_MARK, normalized=True, start_differs=True)
    if kinds in ([], ["Metaspace"]) and model.get("type") == "BPE":
        reason = _refused_merges(model)
        if reason is None:
            return SegmentRule("sentencepiece BPE", "both", excluded=SPACE_MARK, normalized=True, start_differs=True)
        return NoSegments(reason)
    return NoSegments(f"no rule is known for its pre-tokeniser ({', '.join(kinds) or 'none'})")


def _byte_level_rule(steps: Sequence[Mapping[str, Any]], *, normalized: bool) -> SegmentRule | NoSegments:
    byte_level = steps[-1]
    starts = bool(byte_level.get("add_prefix_space"))
    if len(steps) == 1:
        if not byte_level.get("use_regex", True):
            return NoSegments("its byte-level pre-tokeniser splits nowhere")
        if normalized or starts:
            return SegmentRule("GPT-2", "end", normalized=normalized, start_differs=starts)
        return SegmentRule("GPT-2", "end", tails=TAILS, line_cut="before")
    split = steps[0]
    pattern = split["pattern"].get("Regex")
    whole = split["behavior"] == "Isolated" and not split["invert"] and not byte_level.get("use_regex", True)
    if whole and pattern == BLOOM_SPLIT and not starts:
        if normalized:
            return SegmentRule("BLOOM", "either", excluded=BLOOM_BETWEEN, normalized=True)
        return SegmentRule("BLOOM", "either", excluded=BLOOM_BETWEEN, tails=BLOOM_TAILS, line_cut="behind")
    if whole and pattern in SPLITS and not starts:
        return SegmentRule(SPLITS[pattern], "end", normalized=normalized, tails="" if normalized else TAILS)
    return NoSegments(f"no rule is known for its pre-tokeniser's pattern {pattern!r}")


def _steps(value: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if value is None:
        return []
    if value["type"] != "Sequence":
        return [value]
    return [step for part in value[key] for step in _steps(part, key)]


def _refused_tokens(added_tokens: Sequence[Mapping[str, Any]]) -> str | None:
    """A segment that holds an added token is seen when it is encoded, unless the token has a space of its own."""
    for token in added_tokens:
        text = token["content"]
        if " " in text and text.strip(" ") or text == " " or SPACE_MARK in text:
            return f"its added token {text!r} holds a space"
    return None


def _refused_normalizer(value: Mapping[str, Any] | None) -> str | None:
    """Name a normaliser step that may look across a cut, or that is not known."""
    local = ("Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Strip", "Prepend")
    for step in _steps(value, "normalizers"):
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String"), step["pattern"].get("Regex")
            if pattern == (" ", None) and step["content"] in (" ", SPACE_MARK) or pattern == (None, " {2,}"):
                continue
            return f"its normaliser replaces {pattern[0] or pattern[1]!r}"
        if step["type"] == "Prepend" and step["prepend"] != SPACE_MARK:
            return f"its normaliser puts {step['prepend']!r} before texts"
        if step["type"] not in local:
            return f"no rule is known for its normaliser {step['type']}"
    return None


def _refused_merges(model: Mapping[str, Any]) -> str | None:
    """Without a pre-tokeniser only the merges say that no piece goes on behind a space."""
    if SPACE_MARK not in model["vocab"] or model.get("ignore_merges"):
        return "its model may join words at a space"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its pieces depend on where a text ends"
    crossing = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}")
    for merge in model["merges"]:
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        if crossing.search(piece):
            return f"its merges make {piece!r}, a piece that goes on behind a space"
    return None


def _joins_next(character: str) -> bool:
    """Tell whether a character may be one grapheme with a following space, or be removed or turned into a space."""
    if unicodedata.category(character)[0] in "ZC" or character in ODD_LETTERS:
        return True
    return 0x11000 <= ord(character) <= 0x11FFF


def _joins_previous(character: str) -> bool:
    """Tell whether a character may be one grapheme with a space before it, or be removed or turned into a space."""
    return unicodedata.category(character)[0] in "ZCM" or character in ODD_LETTERS
