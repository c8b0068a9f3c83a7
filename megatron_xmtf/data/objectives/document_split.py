"""Causal language modelling and prefix-LM: the inputs are the first part of a text, the targets the rest.

    document   It  was  a  dark  and  stormy  night  .                   8 tokens, cut after 3
    causal     inputs   [CLM]  It  was  a                                0.2 * 8 to 0.8 * 8 tokens: 2 to 6, uniformly
               targets  dark  and  stormy  night  .  EOS
    prefix_lm  inputs   It  was  a                                       1 to 7 tokens, uniformly
               targets  dark  and  stormy  night  .  EOS

Inputs have no EOS, since the text goes on; targets have it where the document ends, not where a long one is cut into
chunks. A chunk of one token cannot be cut and makes no example.

    rows of one line     cut_moves: each occurrence is cut at a place of its own, since a row holds the sum of both
    rows of two sides    each length must be known to packing: the cut follows from the chunk, the same in every epoch

A decoder-only model reads the targets of either causally. Under prefix-LM the inputs may see one another in both
directions (`batch.prefix_lm`).

Source:  causal: Soltan et al. 2022 (arXiv 2208.01448), section 2, "20 % to 80 % (uniformly)". prefix_lm: t5.data.
         preprocessors `random_prefix_noise_mask`, a length from 1 to n - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.objectives.counter_random import uniforms
from megatron_xmtf.data.objectives.rule import Example, Lengths, MostTokens

__all__ = ["DocumentSplit", "cut_range"]

EXACT = 1e-9
"""0.2 * 15 is 3.0000000000000004 in some order of roundings and must not become 4."""


def cut_range(
    tokens: NDArray[np.int64], *, minimum: float, maximum: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the least and the most tokens that go to the inputs: minimum to maximum of them, and 1 to n - 1.

    Where no whole number lies between minimum and maximum (0.45 to 0.55 of 3), it is the next one above.
    """
    least = np.minimum(np.maximum(np.ceil(tokens * minimum - EXACT).astype(np.int64), 1), tokens - 1)
    most = np.minimum(np.floor(tokens * maximum + EXACT).astype(np.int64), tokens - 1)
    return least, np.maximum(most, least)


@dataclass(frozen=True)
class DocumentSplit:
    """The rules `causal` and `prefix_lm`, which differ in their settings; see `ObjectiveRule`."""

    minimum_inputs: float
    maximum_inputs: float
    prefix: tuple[int, ...]
    eos_id: int
    cut_moves: bool = False
    """Whether the cut follows from the occurrence, not from the chunk."""

    @property
    def ends_inputs(self) -> bool:
        """Inputs have no EOS, since the text goes on; rows of a model that wants it everywhere add it."""
        return False

    def cuts(self, tokens: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return how many tokens of each chunk go to the inputs."""
        least, most = cut_range(tokens, minimum=self.minimum_inputs, maximum=self.maximum_inputs)
        return least + (uniforms(keys) * (most - least + 1)).astype(np.int64)

    def lengths(self, tokens: NDArray[np.int64], *, is_end: NDArray[np.bool_], keys: NDArray[np.uint64]) -> Lengths:
        """Return prefix + cut and the rest, with EOS at the end of a document."""
        makes_one, cuts = tokens >= 2, self.cuts(tokens, keys)
        return makes_one * (len(self.prefix) + cuts), makes_one * (tokens - cuts + is_end)

    def most(self, tokens: NDArray[np.int64]) -> MostTokens:
        """Return the inputs of the last place where a chunk may be cut, the targets of the first, and all of it."""
        makes_one, mark = tokens >= 2, len(self.prefix)
        least, most = cut_range(tokens, minimum=self.minimum_inputs, maximum=self.maximum_inputs)
        return makes_one * (mark + most), makes_one * (tokens - least + 1), makes_one * (mark + tokens + 1)

    def example(self, tokens: NDArray[np.int32], *, is_end: bool, chunk_key: int, noise_key: int) -> Example:
        """Cut the chunk in two."""
        key = np.array([noise_key if self.cut_moves else chunk_key], np.uint64)
        cut = int(self.cuts(np.array([len(tokens)], np.int64), key)[0])
        end = np.array([self.eos_id] if is_end else [], np.int32)
        return np.concatenate([np.array(self.prefix, np.int32), tokens[:cut]]), np.concatenate([tokens[cut:], end])

    def facts(self) -> dict[str, Any]:
        """Return the settings and the ids of the special tokens."""
        return {
            "rule": "document_split",
            "minimum_inputs": self.minimum_inputs,
            "maximum_inputs": self.maximum_inputs,
            "prefix": list(self.prefix),
            "eos_id": self.eos_id,
            "cut_moves": self.cut_moves,
        }
