"""What one layer does to one micro-batch on one rank: operations, memory traffic, what it keeps, what it sends.

    b rows, s tokens, h hidden_size, a heads of head_dim, i = a x head_dim, f columns of the feed-forward, t = tp;
    bytes of half precision (twice as many in fp32, but for masks)
                                 kept for the backward pass             traffic forward    backward
    each of two norms            its input                  2 sbh             4 sbh          10 sbh
    each of two residuals        dropout's mask, unfused    1 sbh             7 sbh          13 sbh
    inputs of QKV and of fc1                            2 x 2 sbh
    QKV, and attention's output                       6 + 2 sbi / t         4 sbi / t       10 sbi / t
    scores (unfused)                                    5 a s^2 b / t      13 as^2b / t    19 as^2b / t
    activation, f1 columns in                       2 (f1 + f) sb / t    2 (f1 + f) sb / t  (6 f1 + 2 f) sb / t

A BLOOM has i = h and f1 = f = 4h: sbh (10 + 24 / t + 5 a s / h t), as published; a gated layer (f1 = 2f) keeps the
gate's activation as well, 2f sb / t. Sequence parallelism divides the lines without t by t as well.

Traffic, a residual forward: read bias-added output and residual, write mask and sum (2 + 2 + 1 + 2 with the bias's
read neglected); backward: mask and gradient in, gradient out (5), the bias's sum (2), the two gradients added (6). A
norm backward: gradient and input in, gradient out (6), both again for the weights' gradients (4).

Source:  Korthikanti et al. 2022, arXiv 2205.05198, section 4 and table 2 (what is kept); Narayanan et al. 2021, section
         3 (what is sent). The traffic is counted from Megatron's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.layout import AttentionKind, Layout, ResidualKind
from megatron_xmtf.planning.model_shape import LayerKind, layer_matrices

__all__ = ["SCORES", "LayerWork", "ScoreBytes", "WorkKey", "layer_work", "work_key"]


@dataclass(frozen=True)
class ScoreBytes:
    """Bytes of each score, [b, a, query, key], in half precision."""

    kept: float
    kept_fp32: float
    """Instead of it in fp32, where no copy in half precision is made."""
    kept_mask: float
    """With dropout, on top."""
    forward: float
    """Traffic."""
    backward: float
    bias: float
    """Of a dense bias, once a forward pass; recomputation closes over it, so each micro-batch in flight keeps it."""


SCORES: dict[AttentionKind, ScoreBytes] = {
    # Softmax (2) and, with dropout, what is left of it and the mask (3).
    "unfused": ScoreBytes(2, 4, 3, 13, 19, 0),
    # fp32 softmax (4) and its half-precision copy (2); without fusion each of product, scale, bias, softmax, cast and
    # product reads and writes: 4 + 8 + 12 + 8 + 6 + 2 forward, as much again and 4 more backward.
    "reference": ScoreBytes(6, 4, 1, 40, 44, 4),
    "sdpa": ScoreBytes(0, 0, 0, 4, 4, 4),
    "fused": ScoreBytes(0, 0, 0, 0, 0, 0),
}


@dataclass(frozen=True)
class LayerWork:
    """Of one layer, one micro-batch, one rank."""

    products: tuple[tuple[int, int, int], ...]
    """The linear layers: (tokens, inputs, outputs) of the rank's shard."""
    sums_inputs: tuple[bool, ...]
    """Of each, whether tensor-parallel ranks sum the gradient of what came in: where they share the outputs."""
    attentions: tuple[tuple[int, int, int, int], ...]
    """(heads x rows, query, key, head_dim) of each attention."""
    forward_bytes: float
    """Memory traffic of everything but matrix products."""
    backward_bytes: float
    score_forward_bytes: float
    """The part of `forward_bytes` that is attention's own, which selective recomputation repeats."""
    kept_bytes: float
    """Kept from forward to backward without recomputation."""
    kept_score_bytes: float
    """The part of it that selective recomputation drops."""
    input_bytes: float
    """Of the layer's input, which is all that full recomputation keeps."""
    bias_bytes: float
    """Of a dense attention bias, shared by the layers of a forward pass."""
    parameters: int
    """Of its matrices, for the traffic of gradients."""
    reduced_forward: float
    """Bytes of the tensors that tensor-parallel ranks sum up in the forward pass."""
    sums_forward: int
    """In how many tensors."""


@lru_cache(maxsize=4096)
def layer_work(architecture: Architecture, kind: LayerKind, layout: WorkKey) -> LayerWork:
    """Count one layer; layout: what `work_key` takes of it."""
    tp, rows = layout.tp, layout.micro_batch_size
    encoder, decoder = layout.sides
    number = layout.number_bytes
    wide = number / 2
    own = rows * (encoder if kind == "encoder" else decoder)
    context = rows * encoder if kind == "decoder" else 0
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads
    if isinstance(architecture, BloomArchitecture):
        inner, first = hidden, architecture.ffn_hidden_size
    else:
        inner, first = architecture.attention_size, architecture.ffn_hidden_size * (2 if architecture.gated else 1)
    ffn, whole = architecture.ffn_hidden_size, tp if layout.sequence_parallel else 1
    attentions = 2 if kind == "decoder" else 1
    sublayers = attentions + 1

    matrices = layer_matrices(architecture, kind)
    shards = tuple((context if matrix.reads_context else own, *matrix.shard(tp)) for matrix in matrices)
    # [b, a, query, key]: squares of each side, and across.
    side = own / rows
    pairs = rows * (side * side + (side * encoder if kind == "decoder" else 0))
    keys = (own // rows, encoder) if kind == "decoder" else (own // rows,)
    scores, score = heads * pairs / tp, SCORES[layout.attention]
    score_kept = scores * (score.kept if number == 2 else score.kept_fp32)
    score_kept += scores * score.kept_mask if layout.dropout else 0

    hidden_tokens = own * hidden / whole
    # Query, key, value and output of each attention; across, keys and values are the context's.
    attended = (4 * own + (2 * own + 2 * context if kind == "decoder" else 0)) * inner / tp
    # A gate keeps its own activation beside the product.
    activated = own * (first + (ffn if first == ffn else 2 * ffn)) / tp
    kept = (
        hidden_tokens * sublayers * (2 * number + (1 if layout.dropout and layout.residual == "reference" else 0))
        + (attended + activated) * number
        + score_kept  # what enters cross-attention is kept once for all layers; `memory_model` counts it
    )
    forward = (hidden_tokens * sublayers * 11 + own * inner * 4 * attentions / tp + 2 * activated) * wide
    backward = hidden_tokens * sublayers * 23 * wide
    backward += (own * inner * 10 * attentions + own * (6 * first + 2 * ffn)) / tp * wide
    score_forward = scores * (score.forward + (layout.position_bytes if score.kept else 0)) * wide
    reduced = own * hidden * number
    return LayerWork(
        products=shards,
        sums_inputs=tuple(matrix.is_column for matrix in matrices),
        attentions=tuple((heads // tp * rows, own // rows, length, inner // heads) for length in keys),
        forward_bytes=forward + score_forward,
        backward_bytes=backward + scores * score.backward * wide,
        score_forward_bytes=score_forward,
        kept_bytes=kept,
        kept_score_bytes=score_kept,
        input_bytes=hidden_tokens * number,
        bias_bytes=scores * score.bias,
        parameters=sum(inputs * outputs for _, inputs, outputs in shards),
        reduced_forward=sublayers * reduced,
        sums_forward=sublayers,
    )


@dataclass(frozen=True)
class WorkKey:
    """What of a layout the work of a layer depends on, and nothing else, so that a search counts each once."""

    tp: int
    sequence_parallel: bool
    micro_batch_size: int
    sides: tuple[int, int]
    number_bytes: int
    attention: AttentionKind
    dropout: bool
    residual: ResidualKind
    position_bytes: float


def work_key(layout: Layout) -> WorkKey:
    """Return what `layer_work` needs to know of a layout."""
    return WorkKey(
        tp=layout.tp,
        sequence_parallel=layout.parallel.sequence_parallel,
        micro_batch_size=layout.micro_batch_size,
        sides=layout.sides,
        number_bytes=layout.number_bytes,
        attention=layout.attention,
        dropout=layout.dropout,
        residual=layout.residual,
        position_bytes=layout.engine.position_bytes,
    )
