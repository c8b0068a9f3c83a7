"""T5's span corruption: spans are dropped for sentinels, and the decoder writes the spans.

    chunk     Thank you for inviting me to your party last week      10 tokens
    noise       .    .   X     X     .  .   .     .    X    .
    inputs    Thank you <X> me to your party <Y> week EOS            each span one sentinel
    targets   <X> for inviting <Y> last <Z> EOS                      each run of the other tokens one sentinel

The published example above ends with a token that is kept, and its targets with a last sentinel <Z>. T5's own masks end
with noise (`spans.random_spans`), so that targets have as many sentinels as inputs:

    tokens n, noise m = round(0.15 n), spans s = round(m / 3)      inputs n - m + s + 1      targets m + s + 1

Sentinels are taken in the order of their numbers: <extra_id_0> first, which in T5 and mT5 is the last id of the
vocabulary, and so on downwards.

Source:  Raffel et al. 2020 (arXiv 1910.10683), figure 2 and section 3.1.4; t5.data.preprocessors `span_corruption`,
         `noise_span_to_unique_sentinel`, `random_spans_helper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.objectives.rule import Example, Lengths, MostTokens
from megatron_xmtf.data.objectives.spans import noise_spans, noise_tokens, random_spans

__all__ = ["SpanCorruption", "with_sentinels"]


def with_sentinels(
    tokens: NDArray[np.int32], dropped: NDArray[np.bool_], sentinels: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Put one sentinel in the place of each run of dropped tokens.

    Args:    tokens: int32 [n]. dropped: bool [n]. sentinels: int32, at least as many as there are runs.
    """
    begins = dropped & ~np.concatenate([[False], dropped[:-1]])
    numbers = np.cumsum(begins) - 1
    marked = np.where(dropped, sentinels[numbers], tokens)
    return marked[~dropped | begins]


@dataclass(frozen=True)
class SpanCorruption:
    """The rule `span_corruption`; see `ObjectiveRule`."""

    noise_density: float
    mean_span_length: float
    sentinels: tuple[int, ...]
    """Ids in the order in which they are used."""
    prefix: tuple[int, ...]
    eos_id: int

    @property
    def cut_moves(self) -> bool:
        """The lengths follow from the chunk's, whatever the noise."""
        return False

    @property
    def ends_inputs(self) -> bool:
        """Inputs end with EOS, as targets do."""
        return True

    def spans(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of spans in chunks of these lengths."""
        noise = noise_tokens(tokens, density=self.noise_density)
        return noise_spans(noise, tokens, mean_length=self.mean_span_length)

    def lengths(self, tokens: NDArray[np.int64], *, is_end: NDArray[np.bool_], keys: NDArray[np.uint64]) -> Lengths:
        """Return chunk - noise + spans + EOS and noise + spans + EOS."""
        inputs, targets, _ = self.most(tokens)
        return inputs, targets

    def most(self, tokens: NDArray[np.int64]) -> MostTokens:
        """Return the lengths, which are the same for all chunks of a length."""
        makes_one = tokens >= 2
        noise, spans = noise_tokens(tokens, density=self.noise_density), self.spans(tokens)
        inputs, targets = makes_one * (len(self.prefix) + tokens - noise + spans + 1), makes_one * (noise + spans + 1)
        return inputs, targets, inputs + targets

    def example(self, tokens: NDArray[np.int32], *, is_end: bool, chunk_key: int, noise_key: int) -> Example:
        """Draw spans and part the chunk at them."""
        noise = random_spans(len(tokens), density=self.noise_density, mean_length=self.mean_span_length, key=noise_key)
        sentinels, eos = np.array(self.sentinels, np.int32), np.array([self.eos_id], np.int32)
        inputs = [np.array(self.prefix, np.int32), with_sentinels(tokens, noise, sentinels), eos]
        return np.concatenate(inputs), np.concatenate([with_sentinels(tokens, ~noise, sentinels), eos])

    def facts(self) -> dict[str, Any]:
        """Return the settings and the ids of the special tokens."""
        return {
            "rule": "span_corruption",
            "noise_density": self.noise_density,
            "mean_span_length": self.mean_span_length,
            "sentinels": list(self.sentinels),
            "prefix": list(self.prefix),
            "eos_id": self.eos_id,
        }
