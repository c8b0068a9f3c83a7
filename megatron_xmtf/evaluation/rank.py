"""Answer by ranking: the choice whose tokens the model finds most probable behind the inputs.

    inputs            choice      tokens of " choice"   log p of each      sum     answer
    "After Monday?"   "Tuesday"   11 42                 -1.0  -0.5         -1.5    <- the highest
                      "Friday"    17                    -2.5               -2.5

    score(choice) = sum over the choice's tokens of log p(token | inputs, the tokens before it)

No division by length unless the task says so; ties go to the first choice.
Source: rank evaluation of T0 (bigscience-workshop/t-zero) and BLOOMZ (Muennighoff/t-zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import RecordError
from megatron_xmtf.evaluation.backend import Pair
from megatron_xmtf.evaluation.records import EvaluationExample
from megatron_xmtf.evaluation.task_file import TaskSettings

__all__ = ["RankedPairs", "best_choices", "build_pairs"]


@dataclass(frozen=True)
class RankedPairs:
    """All (inputs, choice) pairs of some examples, in order.

    Args:  pairs: to be scored. owners: for each pair, position of its example. characters: length of each choice's
           text. truncated: positions of the examples whose inputs lost tokens on the left to fit the model.
    """

    pairs: list[Pair]
    owners: list[int]
    characters: list[int]
    truncated: set[int]


def build_pairs(
    examples: Sequence[EvaluationExample],
    *,
    settings: TaskSettings,
    tokenizer: Tokenizer,
    max_length: int | None,
    inputs_end_with_eos: bool = False,
) -> RankedPairs:
    """Tokenise the inputs of each example once, and each of its choices as a continuation.

    Args:    max_length: most tokens of a pair. Inputs that are too long lose tokens on the left, the same number
             for every choice of an example, so that all are ranked behind the same inputs.
             inputs_end_with_eos: as the model was trained; the task's own `inputs_eos` goes before it.
    Raises:  RecordError: inputs or a choice without a token, or a choice alone longer than the model takes.
    """
    ends = inputs_end_with_eos if settings.inputs_eos is None else settings.inputs_eos
    end = [tokenizer.eos_id] if ends else []
    encoded = tokenizer.encode_batch([example.inputs for example in examples])
    inputs = [[*ids, *end] if ids else [] for ids in encoded]
    texts = [settings.target_prefix + choice for example in examples for choice in example.choices]
    eos = [tokenizer.eos_id] if settings.score_eos else []
    targets = iter([*ids, *eos] if ids else [] for ids in tokenizer.encode_batch(texts))
    ranked = RankedPairs([], [], [], set())
    for position, (example, input_ids) in enumerate(zip(examples, inputs, strict=True)):
        choice_ids = [next(targets) for _ in example.choices]
        if not input_ids or not all(choice_ids):
            raise RecordError(
                f"{example.where}: inputs or a choice become no token with this tokenizer; mend the text."
            )
        room = None if max_length is None else max_length - max(map(len, choice_ids))
        if room is not None and room < 1:
            raise RecordError(
                f"{example.where}: a choice has {max(map(len, choice_ids))} tokens, and the model takes {max_length} "
                "with at least one of the inputs; shorten the choice."
            )
        if room is not None and len(input_ids) > room:
            input_ids = input_ids[-room:]
            ranked.truncated.add(position)
        for choice, ids in zip(example.choices, choice_ids, strict=True):
            ranked.pairs.append((input_ids, ids))
            ranked.owners.append(position)
            ranked.characters.append(len(choice))
    return ranked


def best_choices(ranked: RankedPairs, scores: Sequence[float], *, normalization: str) -> list[int]:
    """Return for each example the position of its highest-scoring choice; ties go to the first.

    Args:  scores: of `ranked.pairs`, natural log. normalization: `none`, `tokens` or `characters` (of the choice).
    """
    assert len(scores) == len(ranked.pairs), f"{len(scores)} scores for {len(ranked.pairs)} pairs"
    best: list[tuple[float, int]] = []
    counts: list[int] = []
    for (_, target), owner, characters, score in zip(
        ranked.pairs, ranked.owners, ranked.characters, scores, strict=True
    ):
        divisor = {"none": 1, "tokens": len(target), "characters": characters}[normalization]
        if owner == len(best):
            best.append((-float("inf"), 0))
            counts.append(0)
        if score / divisor > best[owner][0]:
            best[owner] = (score / divisor, counts[owner])
        counts[owner] += 1
    return [choice for _, choice in best]
