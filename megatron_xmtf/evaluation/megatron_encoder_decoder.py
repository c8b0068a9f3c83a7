"""Ask an encoder-decoder checkpoint on the parallel engine: inputs are encoded once, whatever is asked behind them.

    questions   [6 7] with choices [8 2], [9 2]        [4] with choices [5 2], [3 3 2]
    encoder     6 7 4    segments 1 1 2                 one row, encoded in pass 0
    pass 0      targets  8 2 5 2      segments 1 1 2 2    each scored behind its own inputs
    pass 1      targets  9 2 3 3 2    segments 1 1 2 2 2  the decoder alone

Generation is the same with one prompt a row: pass t asks the decoder for token t of every answer that goes on.
Every rank calls the same methods with the same arguments and gets the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_xmtf.data.encoder_decoder_batch import build_encoder_decoder_batch
from megatron_xmtf.data.pair_rows import join_pairs, pack_pairs
from megatron_xmtf.evaluation.backend import Pair, ignore_progress, require_finite
from megatron_xmtf.evaluation.megatron import (
    BATCHES_PER_RUN,
    ROW_MULTIPLE,
    ROW_TOKENS,
    MegatronBackend,
    NextTokens,
    best_at_end,
    sum_of_segments,
)
from megatron_xmtf.models.encoder_cache import CachedBatch, cache_encoder
from megatron_xmtf.models.forward import run_forward, run_logits

__all__ = ["EncoderDecoderMegatronBackend"]

DECODER_MULTIPLE = 16
"""The decoder's side of a row is a multiple of this and of the tensor-parallel size; choices are short."""


class EncoderDecoderMegatronBackend(MegatronBackend):
    """An encoder-decoder that is split over ranks.

    Args:  as `MegatronBackend`. inputs_end_with_eos: as it was trained.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        pad_id: int,
        inputs_end_with_eos: bool = True,
        logits_per_batch: int | None = None,
    ) -> None:
        super().__init__(chunks, pad_id=pad_id, logits_per_batch=logits_per_batch)
        architecture = unwrap_model(self.chunks[0]).architecture
        self.decoder_start_id = int(architecture.decoder_start_token_id)
        self.max_length = architecture.max_positions
        self.inputs_end_with_eos = inputs_end_with_eos

    def score(self, pairs: Sequence[Pair], *, advance: Callable[[int], None] = ignore_progress) -> list[float]:
        """Score pairs, those of the same inputs behind one encoding (see `Backend.score`)."""
        if not pairs:
            return []
        positions: dict[tuple[int, ...], list[int]] = {}
        for position, pair in enumerate(pairs):
            positions.setdefault(tuple(pair[0]), []).append(position)
        inputs, asked = list(positions), list(positions.values())
        lengths = [(len(ids), max(len(pairs[i][1]) for i in of)) for ids, of in positions.items()]
        encoder_length, decoder_length = self._row_lengths(lengths)
        rows = pack_pairs(lengths, encoder_length=encoder_length, decoder_length=decoder_length)
        scores = [math.nan] * len(pairs)
        for run in self._runs_of_rows(rows, tokens=encoder_length + decoder_length):
            cached = cache_encoder(self.chunks)
            for number in range(max(len(asked[question]) for batch in run for row in batch for question in row)):
                left = {question for question, of in enumerate(asked) if number < len(of)}
                going = self._rounds(run, left)
                batches = [
                    self._batch(
                        [_nth_targets(row, inputs=inputs, asked=asked, pairs=pairs, number=number) for row in batch],
                        place=place,
                        is_first=number == 0,
                        encoder_length=encoder_length,
                        decoder_length=decoder_length,
                    )
                    for place, batch in going
                ]
                found = [entry for scored in run_forward(cached, batches, sum_of_segments) for entry in scored]
                for position, score in found:
                    if position >= 0:
                        scores[position] = score
                advance(sum(position >= 0 for position, _ in found))
        return require_finite(scores)

    def _writers(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> Iterator[tuple[list[int], NextTokens]]:
        """Yield runs of prompts, the longest first; each prompt is encoded once (see `MegatronBackend`)."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        decoder_most = _round_up(max_new_tokens, self._decoder_multiple())
        longest = max([len(prompt) for prompt in prompts], default=1)
        for run in self._runs_of_rows([[i] for i in order], tokens=_round_up(longest, ROW_MULTIPLE) + decoder_most):
            yield (
                [i for batch in run for row in batch for i in row],
                partial(self._next_tokens_of_run, cache_encoder(self.chunks), run, prompts, answers),
            )

    def _next_tokens_of_run(
        self,
        cached: Sequence[torch.nn.Module],
        run: list[list[list[int]]],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        going: Sequence[int],
    ) -> dict[int, int]:
        """Return the most probable token behind each answer that goes on; all of these are equally long."""
        step = len(answers[going[0]])
        longest = max(len(prompts[i]) for batch in run for row in batch for i in row)
        places = self._rounds(run, set(going))
        batches = [
            self._batch(
                # One more token than the answer has: its place is where the next one is predicted.
                [([(prompts[i], [*answers[i], self.pad_id]) for i in row], row) for row in batch],
                place=place,
                is_first=step == 0,
                encoder_length=_round_up(longest, ROW_MULTIPLE),
                decoder_length=_round_up(step + 1, self._decoder_multiple()),
            )
            for place, batch in places
        ]
        tokens = [token for found in run_logits(cached, batches, best_at_end) for token in found]
        return dict(zip((i for _, batch in places for row in batch for i in row), tokens, strict=True))

    def _row_lengths(self, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return the tokens of a row on either side, so that both sides of the rows fill about evenly."""
        inputs, targets = zip(*lengths, strict=True)
        encoder_length = _round_up(max(*inputs, min(ROW_TOKENS, sum(inputs)), 1), ROW_MULTIPLE)
        beside = min(sum(targets), math.ceil(1.25 * encoder_length * sum(targets) / sum(inputs)))
        return encoder_length, _round_up(max(*targets, beside, 1), self._decoder_multiple())

    def _decoder_multiple(self) -> int:
        return math.lcm(DECODER_MULTIPLE, parallel_state.get_tensor_model_parallel_world_size())

    def _runs_of_rows(self, rows: Sequence[list[int]], *, tokens: int) -> list[list[list[list[int]]]]:
        """Deal rows to micro-batches of one size, and these to runs; the last micro-batch is completed with nothing."""
        size = self._batch_size(len(rows), tokens=tokens)
        full = [*rows, *([] for _ in range(-len(rows) % size))]
        batches = [full[i : i + size] for i in range(0, len(full), size)]
        ranks = parallel_state.get_data_parallel_world_size() * parallel_state.get_pipeline_model_parallel_world_size()
        count = BATCHES_PER_RUN * ranks
        return [batches[i : i + count] for i in range(0, len(batches), count)]

    def _rounds(self, run: list[list[list[int]]], going: set[int]) -> list[tuple[int, list[list[int]]]]:
        """Return micro-batches that are asked again, with their places in the run.

        Micro-batches are dealt to the data-parallel ranks one each, round by round, and what was encoded lies on the
        rank that did it: only whole rounds are left out.
        """
        dp_size = parallel_state.get_data_parallel_world_size()
        places = []
        for begin in range(0, len(run), dp_size):
            dealt = run[begin : begin + dp_size]
            if any(number in going for batch in dealt for row in batch for number in row):
                places += list(enumerate(dealt, start=begin))
        return places

    def _batch(
        self,
        rows: Sequence[tuple[list[Pair], list[int]]],
        *,
        place: int,
        is_first: bool,
        encoder_length: int,
        decoder_length: int,
    ) -> CachedBatch:
        """Build a micro-batch of rows, each its pairs and their numbers."""
        joined = [
            join_pairs(
                pairs,
                numbers,
                encoder_length=encoder_length,
                decoder_length=decoder_length,
                pad_id=self.pad_id,
                decoder_start_id=self.decoder_start_id,
            )
            for pairs, numbers in rows
        ]
        batch = build_encoder_decoder_batch(joined, normalization="target_token")
        return CachedBatch.of(batch, number=place, is_first=is_first)


def _nth_targets(
    row: list[int],
    *,
    inputs: Sequence[tuple[int, ...]],
    asked: Sequence[list[int]],
    pairs: Sequence[Pair],
    number: int,
) -> tuple[list[Pair], list[int]]:
    """Return the pairs of a row in pass `number`, and their positions; -1 and no targets where there are no more."""
    positions = [asked[question][number] if number < len(asked[question]) else -1 for question in row]
    joined: list[Pair] = [
        (inputs[question], pairs[position][1] if position >= 0 else ())
        for question, position in zip(row, positions, strict=True)
    ]
    return joined, positions


def _round_up(length: int, multiple: int) -> int:
    return -(-max(length, 1) // multiple) * multiple
