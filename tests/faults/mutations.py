"""Damage a file's bytes the ways that find bugs in readers; drawn by hypothesis, which shrinks what it finds.

flip, set, cut out, double, insert, truncate     at a drawn place, one to four in a row
number       one of the file's numbers becomes another: -1, 2^31, 2^63, 1e999 ...
value        of JSON: one value, at any depth, becomes another, or its key goes
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS = (b"-1", b"0", b"1", b"2147483648", b"9223372036854775808", b"-9223372036854775809", b"1e999", b"NaN", b"1.5")
WORDS = tuple(
    struct.pack("<q", value) for value in (-1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 0x7FF0000000000000)
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**70, -1.5, 1e308, "", "a\0b", "../../etc/passwd", "/etc/passwd", "\ud83d\ude00" * 50),
    *([], {}, [[]], {"": {}}, [0] * 300, "9" * 400, "float32", {"bytes": -1, "sha256": 3}),
)

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "word", "cut", "double", "insert", "truncate", "number", "value"]),
        st.floats(0, 1, exclude_max=True, allow_nan=False),
        st.integers(0, 2**16 - 1),
        st.binary(max_size=6),
    ),
    min_size=1,
    max_size=4,
)
"""Kind, place as a part of the file, choice, bytes."""


def mutate(content: bytes, wanted: list[tuple[str, float, int, bytes]]) -> bytes:
    """Apply edits one after the other."""
    for kind, place, choice, data in wanted:
        content = _EDITS[kind](content, int(place * len(content)), choice, data)
    return content


def _number(content: bytes, at: int, choice: int, data: bytes) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return content
    match = min(found, key=lambda one: abs(one.start() - at))
    return content[: match.start()] + NUMBERS[choice % len(NUMBERS)] + content[match.end() :]


def _value(content: bytes, at: int, choice: int, data: bytes) -> bytes:
    """Change one value of a JSON file; what is none, or no more, is left alone."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        inner = waiting.pop()
        keys: list[Any] = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                waiting.append(inner[key])
    if not isinstance(root, dict | list) or not places:
        return content
    inner, key = places[(at * 31 + choice) % len(places)]
    if choice % 5 == 0:
        del inner[key]
    else:
        inner[key] = VALUES[choice % len(VALUES)]
    return json.dumps(root).encode()


_EDITS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": lambda b, at, n, d: b[:at] + bytes([b[at] ^ (1 << n % 8)]) + b[at + 1 :] if b else b,
    "set": lambda b, at, n, d: b[:at] + d + b[at + len(d) :],
    "word": lambda b, at, n, d: b[:at] + WORDS[n % len(WORDS)] + b[at + 8 :],
    "cut": lambda b, at, n, d: b[:at] + b[at + 1 + n % 64 :],
    "double": lambda b, at, n, d: b[:at] + b[at : at + 1 + n % 64] * 2 + b[at + 1 + n % 64 :],
    "insert": lambda b, at, n, d: b[:at] + d + b[at:],
    "truncate": lambda b, at, n, d: b[:at],
    "number": _number,
    "value": _value,
}
