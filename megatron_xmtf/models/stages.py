"""Which layers of an encoder-decoder each pipeline stage holds: one global list, encoder first, cut by cost.

    mT5-large, 24 + 24 layers, 1,024 and 256 tokens, 4 stages: a layer of the encoder takes 30.6 GFLOP a row, one of the
    decoder 13.3, the output layer 131.1

    stage     0            1            2                         3
    layers    9 encoder    10 encoder   5 encoder, 11 decoder     13 decoder, output layer
    GFLOP     276          306          300                       304

    FLOPs of a forward pass a row of e and d tokens; h hidden_size, a heads x head_dim, f columns of the feed-forward
    encoder layer   2 e (4 h a + w h f) + 4 e^2 a                        w: 3 weights when gated, else 2
    decoder layer   2 d (6 h a + w h f) + 2 e (2 h a) + 4 d^2 a + 4 d e a
    output layer    2 d h V, on the last stage, which may hold no layer for it

With a virtual pipeline, chunk c of stage s is part c x stages + s of the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["DEFAULT_LENGTHS", "ChunkPlace", "head_cost", "layer_costs", "split_by_cost", "stage_layers"]

DEFAULT_LENGTHS = (1024, 256)
"""Encoder and decoder tokens of a row where no run says its own. Any split computes the same."""


@dataclass(frozen=True)
class ChunkPlace:
    """Which part of the model a chunk is."""

    layers: range
    """Global layer numbers, encoder layers first."""
    pre_process: bool
    """It embeds."""
    post_process: bool
    """It computes logits and losses."""
    vp_stage: int | None
    """Its number on its rank, None without a virtual pipeline."""
    copy: int
    """Its number in the order of the pipeline, chunk 0 of all stages first."""


def stage_layers(
    architecture: EncoderDecoderArchitecture,
    parallel: ParallelConfig,
    *,
    encoder_length: int | None = None,
    decoder_length: int | None = None,
) -> list[list[range]]:
    """Return the global layer numbers of each chunk of each stage: `stage_layers(...)[stage][chunk]`.

    Args:    parallel: `pipeline_layers` is obeyed where it is given (`check_split` has checked it).
             encoder_length, decoder_length: tokens of a row, for the costs.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.pipeline_layers is not None:
        counts = list(parallel.pipeline_layers)
    else:
        lengths = (encoder_length or DEFAULT_LENGTHS[0], decoder_length or DEFAULT_LENGTHS[1])
        head = head_cost(architecture, decoder_length=lengths[1])
        counts = split_by_cost(layer_costs(architecture, *lengths), last_extra=head, parts=stages * chunks)
    ends = list(accumulate(counts))
    parts = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return [[parts[chunk * stages + stage] for chunk in range(chunks)] for stage in range(stages)]


def layer_costs(architecture: EncoderDecoderArchitecture, encoder_length: int, decoder_length: int) -> list[float]:
    """Return the forward FLOPs of each layer for one row, encoder first; see the module's docstring."""
    hidden, inner = architecture.hidden_size, architecture.attention_size
    feed_forward = (3 if architecture.gated else 2) * hidden * architecture.ffn_hidden_size
    e, d = float(encoder_length), float(decoder_length)
    of_encoder = 2 * e * (4 * hidden * inner + feed_forward) + 4 * e * e * inner
    of_decoder = 2 * d * (6 * hidden * inner + feed_forward) + 4 * e * hidden * inner + 4 * (d + e) * d * inner
    return [of_encoder] * architecture.num_encoder_layers + [of_decoder] * architecture.num_decoder_layers


def head_cost(architecture: EncoderDecoderArchitecture, *, decoder_length: int) -> float:
    """Return the forward FLOPs of the output layer for one row whose decoder tokens all have a loss."""
    return 2.0 * decoder_length * architecture.hidden_size * architecture.padded_vocab_size


def split_by_cost(costs: list[float], *, last_extra: float, parts: int) -> list[int]:
    """Cut a list into parts in order so that the dearest part is as cheap as can be.

    Every part but the last holds a layer at least, if there are enough; the last has `last_extra` on top.

        costs 4 4 4 4 1 1 1 1, last_extra 2, 2 parts   ->   [2, 6]     8 and 14; [3, 5] is 12 and 10 and is taken

    Returns: how many each part holds.
    """
    sums = [0.0, *accumulate(costs)]
    count = len(costs)
    # best[part][end]: the dearest part when the first `end` costs make part + 1 parts, and where the last one begins
    best = [[(sums[end], 0) for end in range(count + 1)]]
    for part in range(1, parts):
        extra = last_extra if part == parts - 1 else 0.0
        fewest = 0 if part == parts - 1 else 1
        row = []
        for end in range(count + 1):
            options = [
                (max(best[-1][begin][0], sums[end] - sums[begin] + extra), begin)
                for begin in range(min(part, end), max(end - fewest, min(part, end)) + 1)
            ]
            row.append(min(options))
        best.append(row)
    counts, end = [], count
    for part in reversed(range(parts)):
        begin = best[part][end][1] if part else 0
        counts.append(end - begin)
        end = begin
    return counts[::-1]
