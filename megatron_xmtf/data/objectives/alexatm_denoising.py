"""AlexaTM's denoising: spans are dropped without a trace, and the decoder writes the whole text.

    chunk     the  cat  sat  on  the  mat  and  saw  the  dog  ,  it  ran        13 tokens, 2 of noise: 0.15 * 13 = 1.95
    noise      .    .    .   X    X    .    .    .    .    .   .  .    .
    inputs    the  cat  sat          mat  and  saw  the  dog  ,  it  ran  EOS    13 - 2 + 1
    targets   the  cat  sat  on  the  mat  and  saw  the  dog  ,  it  ran  EOS   13 + 1

No mask tells where something is missing: the model has to notice. Which tokens are dropped is drawn anew at each
occurrence; how many follows from the length. A chunk of one token has nothing to drop and makes no example.

Source:  Soltan et al. 2022 (arXiv 2208.01448), section 2. That inputs end with EOS too is what the tokenizer published
         with the model does (amazon-science/alexa-teacher-models, tokenization_atm.py); the paper does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.objectives.rule import Example, Lengths, MostTokens
from megatron_xmtf.data.objectives.spans import noise_tokens, poisson_spans

__all__ = ["AlexaTMDenoising"]


@dataclass(frozen=True)
class AlexaTMDenoising:
    """The rule `alexatm_denoising`; see `ObjectiveRule`."""

    noise_density: float
    rate: float
    """Of the Poisson distribution of span lengths."""
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

    def lengths(self, tokens: NDArray[np.int64], *, is_end: NDArray[np.bool_], keys: NDArray[np.uint64]) -> Lengths:
        """Return chunk - noise + EOS and chunk + EOS."""
        inputs, targets, _ = self.most(tokens)
        return inputs, targets

    def most(self, tokens: NDArray[np.int64]) -> MostTokens:
        """Return the lengths, which are the same for all chunks of a length."""
        makes_one = tokens >= 2
        noise = noise_tokens(tokens, density=self.noise_density)
        inputs, targets = makes_one * (len(self.prefix) + tokens - noise + 1), makes_one * (tokens + 1)
        return inputs, targets, inputs + targets

    def example(self, tokens: NDArray[np.int32], *, is_end: bool, chunk_key: int, noise_key: int) -> Example:
        """Drop Poisson spans from the inputs."""
        noise = poisson_spans(len(tokens), density=self.noise_density, rate=self.rate, key=noise_key)
        inputs = np.concatenate([np.array(self.prefix, np.int32), tokens[~noise], np.array([self.eos_id], np.int32)])
        return inputs, np.append(tokens, np.int32(self.eos_id))

    def facts(self) -> dict[str, Any]:
        """Return the settings and the ids of the special tokens."""
        return {
            "rule": "alexatm_denoising",
            "noise_density": self.noise_density,
            "rate": self.rate,
            "prefix": list(self.prefix),
            "eos_id": self.eos_id,
        }
