"""What evaluation needs of a model, whatever runs it: log-probabilities of targets, greedy continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_xmtf.errors import NonFiniteError

__all__ = ["Backend", "Pair", "ignore_progress", "logits_at_once", "require_finite"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of the inputs and of the target behind them, neither empty."""


LOGITS_ON_CPU = 1 << 22
"""Logits computed at once, 16 MiB in fp32. Measured on 2 cores, 1 M parameters, 2,048 words: from 2^21 to 2^24 within
10 %, twice as slow at 2^26 (pages that are touched once)."""
LOGITS_ON_GPU = 1 << 28
"""1 GiB in fp32."""
FEWEST_TOKENS = 512
"""Tokens read at once however large the vocabulary: below it a matrix product is too thin."""


def logits_at_once(vocab_size: int, *, on_gpu: bool) -> int:
    """Return how many logits a rank computes at once; results do not depend on it.

    >>> logits_at_once(2048, on_gpu=False) // 2048, logits_at_once(250880, on_gpu=False) // 250880
    (2048, 512)
    """
    return max(LOGITS_ON_GPU if on_gpu else LOGITS_ON_CPU, FEWEST_TOKENS * vocab_size)


def ignore_progress(count: int) -> None:
    """Take a count of finished pairs or prompts, and show nothing."""


def require_finite(scores: list[float]) -> list[float]:
    """Return scores that are all finite.

    Raises:  NonFiniteError: one is not; names how many.
    """
    broken = sum(not math.isfinite(score) for score in scores)
    if broken:
        raise NonFiniteError(
            f"{broken} of {len(scores)} log-probabilities are NaN or infinite; the model's weights are damaged, or its "
            "activations overflow in this precision (try fp32)."
        )
    return scores


class Backend(Protocol):
    """A model that can be asked: a Hugging Face directory, or a checkpoint on the parallel engine."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of inputs and target together that the model takes; None: no limit."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids below this one have an embedding."""
        ...

    @property
    def inputs_end_with_eos(self) -> bool:
        """Whether the model was trained on inputs that end with the end-of-sequence token."""
        ...

    def score(self, pairs: Sequence[Pair], *, advance: Callable[[int], None] = ignore_progress) -> list[float]:
        """Return for each pair the sum of log p(target token | inputs, target tokens before it), natural logarithm.

        Args:    advance: told how many pairs were finished since the last call.
        Raises:  NonFiniteError: a score is NaN or infinite.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int,
        advance: Callable[[int], None] = ignore_progress,
    ) -> list[list[int]]:
        """Return for each prompt the most probable next tokens, one after the other, without the final EOS."""
        ...
