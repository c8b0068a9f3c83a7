"""Ask a checkpoint on the parallel engine: packed rows through Megatron-Core's pipeline schedules.

    pairs      ([6 7], [8 2])   ([4], [5 2])               inputs, target
    tokens      6    7    8    4    5                      one row; segments do not see each other
    labels      7    8    2    5    2
    -loss            a    b    c    d                      where the label is a target
    scores     a + b            c + d                      of segment 1 and of segment 2

Every rank calls the same methods with the same arguments and gets the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, empty_row, pack_examples
from megatron_xmtf.evaluation.backend import Pair, ignore_progress, logits_at_once, require_finite
from megatron_xmtf.models.forward import MicroBatch, device_of, run_forward, run_logits

__all__ = [
    "BATCHES_PER_RUN",
    "ROW_MULTIPLE",
    "ROW_TOKENS",
    "MegatronBackend",
    "NextTokens",
    "best_at_end",
    "sum_of_segments",
]

NextTokens = Callable[[Sequence[int]], dict[int, int]]
"""Positions of prompts whose answers go on -> the most probable next token of each."""

ROW_TOKENS = 256
"""Tokens of a row where no pair is longer: attention's cost per token grows with the row."""
ROW_MULTIPLE = 64
"""Rows are a multiple of this long, so that a tensor-parallel size divides them for sequence parallelism."""
BATCHES_PER_RUN = 16
"""Micro-batches of a data-parallel rank between two reports of progress, per pipeline stage (the bubble is 1/16)."""


class MegatronBackend:
    """A model that is split over ranks.

    Args:  chunks: this rank's, of `build_model`, with weights. pad_id: token that fills rows. prefix_lm: whether inputs
           are read in both directions, as the model was trained (`batch.prefix_lm`).
           logits_per_batch: that a rank computes at once; a bound of memory, default by device.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        pad_id: int,
        prefix_lm: bool = False,
        logits_per_batch: int | None = None,
    ) -> None:
        self.chunks, self.pad_id, self.prefix_lm = list(chunks), pad_id, prefix_lm
        self.vocab_size = int(unwrap_model(self.chunks[0]).architecture.vocab_size)
        local_words = -(-self.vocab_size // parallel_state.get_tensor_model_parallel_world_size())
        on_gpu = device_of(self.chunks).type == "cuda"
        self.logits_per_batch = logits_per_batch or logits_at_once(local_words, on_gpu=on_gpu)
        self.max_length: int | None = None  # ALiBi has no last position
        self.inputs_end_with_eos = False

    def score(self, pairs: Sequence[Pair], *, advance: Callable[[int], None] = ignore_progress) -> list[float]:
        """Score pairs packed into rows (see `Backend.score`)."""
        if not pairs:
            return []
        lengths = [len(inputs) + len(target) for inputs, target in pairs]
        sequence_length = _round_up(max(max(lengths) - 1, min(ROW_TOKENS, sum(lengths))))
        rows = pack_examples(pairs, sequence_length=sequence_length, pad_id=self.pad_id)
        batches = self._batches(rows, sequence_length)
        scores = [math.nan] * len(pairs)
        for run in self._runs(batches):
            for scored in run_forward(self.chunks, run, sum_of_segments):
                for position, score in scored:
                    scores[position] = score
            advance(sum(batch.num_examples for batch in run))
        return require_finite(scores)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int,
        advance: Callable[[int], None] = ignore_progress,
    ) -> list[list[int]]:
        """Write answers greedily (see `Backend.generate`)."""
        answers: list[list[int]] = [[] for _ in prompts]
        for going, next_tokens in self._writers(prompts, answers, max_new_tokens=max_new_tokens):
            for _ in range(max_new_tokens):
                if not going:
                    break
                tokens = next_tokens(going)
                still_going = [i for i in going if tokens[i] != eos_id]
                for i in still_going:
                    answers[i].append(tokens[i])
                advance(len(going) - len(still_going))
                going = still_going
            advance(len(going))
        return answers

    def _writers(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> Iterator[tuple[list[int], NextTokens]]:
        """Yield (positions of prompts, what finds their next tokens): all at once, the whole text read again each step.

        Args:  answers: of each prompt, as they grow. max_new_tokens: the longest that they become.
        """
        yield list(range(len(prompts))), partial(self._next_tokens, prompts, answers)

    def _next_tokens(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], going: Sequence[int]
    ) -> dict[int, int]:
        """Return the most probable token behind each answer that goes on; a row holds one prompt and its answer."""
        sequence_length = _round_up(max(len(prompts[i]) + len(answers[i]) for i in going))
        rows = [
            _unfinished_row(prompts[i], answers[i], sequence_length=sequence_length, pad_id=self.pad_id) for i in going
        ]
        found = run_logits(self.chunks, self._batches(rows, sequence_length), best_at_end)
        return dict(zip(going, (token for tokens in found for token in tokens), strict=True))

    def _batches(self, rows: Sequence[Row], sequence_length: int) -> list[Batch]:
        """Deal rows to micro-batches of one size, the last completed with empty rows."""
        size = self._batch_size(len(rows), tokens=sequence_length)
        padding = [empty_row(sequence_length=sequence_length, pad_id=self.pad_id)] * (-len(rows) % size)
        full = [*rows, *padding]
        return [
            build_batch(full[i : i + size], normalization="target_token", prefix_lm=self.prefix_lm)
            for i in range(0, len(full), size)
        ]

    def _batch_size(self, rows: int, *, tokens: int) -> int:
        """Return the rows of a micro-batch: within memory, and enough micro-batches for all ranks."""
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        ranks = parallel_state.get_data_parallel_world_size() * parallel_state.get_pipeline_model_parallel_world_size()
        within_memory = self.logits_per_batch * tp_size // (tokens * self.vocab_size)
        return max(1, min(within_memory, -(-rows // ranks)))

    def _runs(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        dp_size = parallel_state.get_data_parallel_world_size()
        count = BATCHES_PER_RUN * dp_size * parallel_state.get_pipeline_model_parallel_world_size()
        return [list(batches[i : i + count]) for i in range(0, len(batches), count)]


def _unfinished_row(prompt: Sequence[int], answer: Sequence[int], *, sequence_length: int, pad_id: int) -> Row:
    """Return a row of one example whose targets, `answer`, may be none yet."""
    (row,) = pack_examples([((), [*prompt, *answer])], sequence_length=sequence_length, pad_id=pad_id)
    is_target = row.is_target.copy()
    is_target[: len(prompt)] = False
    return replace(row, is_target=is_target)


def sum_of_segments(batch: MicroBatch, losses: Tensor) -> list[tuple[int, float]]:
    """Return (position of the pair, its log-probability) of each segment of a batch.

    Args:  losses: fp32 [micro_batch, sequence], -log p(label).
    """
    weighted = torch.where(batch.loss_weights > 0, -losses, torch.zeros_like(losses))
    num_segments = max(len(row.example_ids) for row in batch.rows)
    sums = torch.zeros(len(batch.rows), num_segments + 1, dtype=torch.float64, device=losses.device)
    sums.scatter_add_(1, batch.segment_ids, weighted.double())  # [micro_batch, segment], column 0 is padding
    examples = [row.example_ids for row in batch.rows]
    return [
        (int(position), score)
        for of_row, row_sums in zip(examples, sums.tolist(), strict=True)
        for position, score in zip(of_row, row_sums[1 : len(of_row) + 1], strict=True)
    ]


def best_at_end(batch: MicroBatch, logits: Tensor) -> list[int]:
    """Return the most probable token behind each row that is not empty.

    Args:  logits: fp32 [micro_batch, sequence, vocab_size].
    """
    lengths = (batch.segment_ids > 0).sum(dim=1).tolist()
    return [int(logits[row, length - 1].argmax()) for row, length in enumerate(lengths) if length]


def _round_up(length: int) -> int:
    return -(-max(length, 1) // ROW_MULTIPLE) * ROW_MULTIPLE
