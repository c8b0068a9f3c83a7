"""Draws that follow from names alone: the same on every machine, whatever is rendered before or beside.

    drawn_number("42", "r7", "cause_or_effect")   ->  a number in [0, 2^64), from SHA-256 of the parts joined by NUL
    mixed(a ^ b)                                  ->  a number in [0, 2^64) for each pair of such numbers, in bulk

To rank n things for each of m others takes n + m hashes and n x m mixings.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["drawn_number", "drawn_numbers", "mixed"]


def drawn_number(*parts: str) -> int:
    """Return a number in [0, 2^64) that follows from the parts."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def drawn_numbers(prefix: tuple[str, ...], names: list[str]) -> NDArray[np.uint64]:
    """Return `drawn_number(*prefix, name)` for each name, as uint64 [names]."""
    import numpy as np

    return np.fromiter((drawn_number(*prefix, name) for name in names), np.uint64, len(names))


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers one to one, so that numbers that differ in few bits come out unrelated.

    Source:  the finaliser of splitmix64 (Steele, Lea, Flood 2014), with the constants of Stafford's variant 13.
    """
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
