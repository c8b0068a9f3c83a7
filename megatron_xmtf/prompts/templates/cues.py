"""Cues: the short words with a colon that a prompt begins or ends with.

Question: Who wrote it?      begins with a cue
Who wrote it?
Answer:                      ends in a cue
"""

from __future__ import annotations

import re

__all__ = ["begins_with_cue", "ends_in_cue", "split_closing_cue"]

MAX_CUE_CHARACTERS = 40
"""A longer last line with a colon is part of the text."""
OPENING_CUE = re.compile(r"\s*[^\W\d_]{1,20}\s?[:：]")


def begins_with_cue(text: str) -> bool:
    """Tell whether a prompt opens with one word and a colon."""
    return OPENING_CUE.match(text) is not None


def split_closing_cue(text: str) -> tuple[str, str]:
    """Split off the last line of a prompt of several lines where it is a cue; otherwise the second part is empty."""
    body, newline, last = text.rstrip().rpartition("\n")
    if newline and body.strip() and len(last) <= MAX_CUE_CHARACTERS and last.endswith((":", "：")):
        return body.rstrip(), last
    return text, ""


def ends_in_cue(text: str) -> bool:
    """Tell whether a prompt ends in a colon, asking for its answer."""
    return text.rstrip().endswith((":", "："))
