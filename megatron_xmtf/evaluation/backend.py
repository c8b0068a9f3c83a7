"""What evaluation needs of a model, whatever runs it: log-probabilities of targets, greedy continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_xmtf.errors import NonFiniteError

__all__ = ["Backend", "Pair", "ignore_progress", "require_finite"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of the inputs and of the target behind them, neither empty."""


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
