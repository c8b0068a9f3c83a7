"""Judge answers: accuracy, exact match, their standard errors, and what guessing would give."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from megatron_xmtf.evaluation.records import EvaluationExample

__all__ = ["chance_level", "is_exact_match", "majority_level", "share_with_stderr"]


def share_with_stderr(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Return the share of True and its standard error, sqrt(p (1 - p) / (n - 1)); None for a single answer.

    >>> share_with_stderr([True, True, True, False, False])
    (0.6, 0.2449489742783178)
    """
    value = sum(correct) / len(correct)
    if len(correct) == 1:
        return value, None
    return value, math.sqrt(value * (1 - value) / (len(correct) - 1))


def is_exact_match(answer: str, target: str) -> bool:
    """Compare two texts after Unicode composition (NFC), white space made single and trimmed.

    >>> is_exact_match(" a  b\\n", "a b")
    True
    """
    first, second = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (answer, target))
    return first == second


def chance_level(examples: Sequence[EvaluationExample]) -> float:
    """Return what guessing gives: the mean of 1 / number of choices; 0 where the answer is generated.

    Two and four choices: (1/2 + 1/4) / 2 = 0.375.
    """
    return fmean(1 / len(example.choices) if example.choices else 0.0 for example in examples)


def majority_level(examples: Sequence[EvaluationExample]) -> float:
    """Return what the best constant answer gives: always the same text, or always the same position."""
    texts = Counter(example.target for example in examples)
    positions = Counter(example.target_index for example in examples if example.choices)
    return max([*texts.values(), *positions.values()]) / len(examples)
