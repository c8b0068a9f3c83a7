"""What every objective can do: say how long an example will be, and make it, from the tokens of a chunk alone."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Example", "Lengths", "MostTokens", "ObjectiveRule"]

Example = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Inputs and targets."""
Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens of the inputs and of the targets, [chunks] each."""
MostTokens = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens at most: of the inputs, of the targets, of both together, [chunks] each."""


class ObjectiveRule(Protocol):
    """An objective with its special tokens found in a vocabulary.

    Invariant: `example` has the lengths that `lengths` says, for any noise key; where the cut moves, those that it says
    for this noise key, and the sum is the same for any.
    """

    @property
    def cut_moves(self) -> bool:
        """Whether each occurrence of a chunk is cut into inputs and targets at a place of its own."""

    @property
    def ends_inputs(self) -> bool:
        """Whether inputs end with EOS by the objective itself, wherever they are read."""

    def lengths(self, tokens: NDArray[np.int64], *, is_end: NDArray[np.bool_], keys: NDArray[np.uint64]) -> Lengths:
        """Return the lengths of examples; 0 and 0 for a chunk that is too short to make one.

        Args:    tokens: [chunks], their lengths. is_end: [chunks], whether the document ends with the chunk.
                 keys: [chunks], of `counter_random`: of the chunks, where the cut moves of their occurrences.
        """

    def most(self, tokens: NDArray[np.int64]) -> MostTokens:
        """Return the longest inputs, the longest targets, the most of both, that chunks of these lengths can have."""

    def example(self, tokens: NDArray[np.int32], *, is_end: bool, chunk_key: int, noise_key: int) -> Example:
        """Make the example of a chunk that is long enough.

        Args:    noise_key: of this occurrence; decides what may differ between occurrences.
        """

    def facts(self) -> dict[str, Any]:
        """Return what the rule does, in plain values: part of the key of a packing index."""
