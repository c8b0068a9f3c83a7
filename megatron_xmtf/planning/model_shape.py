"""What each pipeline stage holds, counted without building it: layers, matrices, parameters of one rank.

    BLOOM-176B, 4 x 12 ranks, embedding and head counted as layers      parameters of a rank
    stage 0      5 layers, embedding                                       3,982,551,552
    stages 1-10  6 layers                                                  3,700,042,752
    stage 11     5 layers, head (a copy of the embedding)                  3,982,551,552

The dry run builds the same on meta tensors (`training/dry_run.py`); `tests/planning/test_model_shape.py` holds both
together, parameter by parameter. Layers of one kind are alike, so a stage is its number of layers of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

from megatron_xmtf.config.parallel import ParallelConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture, EncoderDecoderArchitecture
from megatron_xmtf.models.stages import stage_layers

__all__ = [
    "ChunkShape",
    "LayerKind",
    "Matrix",
    "RankSize",
    "Stages",
    "chunk_parameters",
    "count_parameters",
    "layer_matrices",
    "rank_size",
    "stage_chunks",
]

LayerKind = Literal["causal", "encoder", "decoder"]
"""Of a decoder-only model; of an encoder; of a decoder that attends to an encoder."""


@dataclass(frozen=True)
class ChunkShape:
    """One model chunk of one stage."""

    layers: tuple[tuple[LayerKind, int], ...]
    """How many layers of each kind; kinds without a layer are left out."""
    embeds: bool
    answers: bool
    """It has the last norm and the output layer."""
    ends_encoder: bool = False
    """It has the encoder's last norm."""

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(count for _, count in self.layers)


@dataclass(frozen=True)
class Matrix:
    """A linear layer of the whole model: `inputs` -> `outputs`."""

    inputs: int
    outputs: int
    is_column: bool
    """Tensor-parallel ranks share the outputs; otherwise the inputs."""
    reads_context: bool = False
    """Encoder tokens go through it, though its layer is the decoder's."""

    def shard(self, tp: int) -> tuple[int, int]:
        """Return (inputs, outputs) of one rank."""
        return (self.inputs, self.outputs // tp) if self.is_column else (self.inputs // tp, self.outputs)


Stages = tuple[tuple[ChunkShape, ...], ...]
"""The chunks of each stage: `stages[stage][chunk]`."""
SPLIT_KEYS = frozenset(
    {
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_layers",
    }
)
"""What of `parallel` the stages depend on, and nothing else, so that a search cuts a model once for each."""


def stage_chunks(architecture: Architecture, parallel: ParallelConfig, *, lengths: RowLengths) -> Stages:
    """Return the chunks of each stage.

    Raises:  ConfigError: the layers do not divide (`architecture.check_split` says it of the rest).
    """
    chosen = {key: getattr(parallel, key) for key in SPLIT_KEYS}
    if chosen["pipeline_layers"] is not None:
        chosen["pipeline_layers"] = tuple(chosen["pipeline_layers"])
    return _stage_chunks(architecture, tuple(chosen.items()), lengths)


@lru_cache(maxsize=4096)
def _stage_chunks(architecture: Architecture, split: tuple[tuple[str, Any], ...], lengths: RowLengths) -> Stages:
    parallel = ParallelConfig(**dict(split))
    if isinstance(architecture, BloomArchitecture):
        counts = architecture.chunk_layers(parallel)
        layers: list[list[tuple[tuple[LayerKind, int], ...]]] = [
            [(("causal", count),) if count else () for count in chunks] for chunks in counts
        ]
        ends = [[False] * len(chunks) for chunks in counts]
    else:
        border = architecture.num_encoder_layers
        two = lengths if isinstance(lengths, EncoderDecoderLengths) else None
        numbers = stage_layers(
            architecture,
            parallel,
            encoder_length=two.encoder_length if two else None,
            decoder_length=two.decoder_length if two else None,
        )
        layers = [[_kinds(chunk, border) for chunk in chunks] for chunks in numbers]
        ends = [[border - 1 in chunk for chunk in chunks] for chunks in numbers]
    last = len(layers) - 1
    return tuple(
        tuple(
            ChunkShape(
                layers=kinds,
                embeds=stage == 0 and chunk == 0,
                answers=stage == last and chunk == len(chunks) - 1,
                ends_encoder=ends[stage][chunk],
            )
            for chunk, kinds in enumerate(chunks)
        )
        for stage, chunks in enumerate(layers)
    )


def _kinds(numbers: range, border: int) -> tuple[tuple[LayerKind, int], ...]:
    encoder = sum(number < border for number in numbers)
    found: list[tuple[LayerKind, int]] = [("encoder", encoder), ("decoder", len(numbers) - encoder)]
    return tuple((kind, count) for kind, count in found if count)


@lru_cache(maxsize=64)
def layer_matrices(architecture: Architecture, kind: LayerKind) -> tuple[Matrix, ...]:
    """Return the linear layers of one layer, in the order of the forward pass."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    if isinstance(architecture, BloomArchitecture):
        inner, first = hidden, ffn
    else:
        inner, first = architecture.attention_size, ffn * (2 if architecture.gated else 1)
    attention = [Matrix(hidden, 3 * inner, True), Matrix(inner, hidden, False)]
    if kind == "decoder":
        attention += [
            Matrix(hidden, inner, True),
            Matrix(hidden, 2 * inner, True, reads_context=True),
            Matrix(inner, hidden, False),
        ]
    return (*attention, Matrix(hidden, first, True), Matrix(ffn, hidden, False))


def chunk_parameters(
    architecture: Architecture, chunk: ChunkShape, *, tp: int, is_whole: bool
) -> list[tuple[tuple[int, ...], int]]:
    """List the parameters that a rank holds of a chunk: (shape, how many of it).

    Args:    is_whole: the chunk is the whole model, so that a tied head needs no copy.
    """
    hidden = architecture.hidden_size
    words = (architecture.padded_vocab_size // tp, hidden)
    if isinstance(architecture, BloomArchitecture):
        norm, bias, tables, has_own_head = 2, True, 1, False
    else:
        norm, bias = (2 if architecture.norm == "layernorm" else 1), architecture.linear_bias
        tables, has_own_head = (1 if architecture.tied_embeddings else 2), not architecture.tied_head
    shapes: list[tuple[tuple[int, ...], int]] = []
    for kind, count in chunk.layers:
        shapes.append(((hidden,), norm * (3 if kind == "decoder" else 2) * count))
        for matrix in layer_matrices(architecture, kind):
            inputs, outputs = matrix.shard(tp)
            shapes.append(((outputs, inputs), count))
            shapes.append(((outputs,), count if bias else 0))
    if chunk.embeds:
        shapes.append((words, tables))
        # BLOOM has a norm behind the embedding.
        shapes.append(((hidden,), 2 if isinstance(architecture, BloomArchitecture) else 0))
    if chunk.ends_encoder:
        shapes.append(((hidden,), norm))
    if chunk.answers:
        shapes.append(((hidden,), norm))
        shapes.append((words, 1 if has_own_head or not is_whole else 0))
    if isinstance(architecture, EncoderDecoderArchitecture):
        shapes += _position_tables(architecture, chunk, tp)
    return [(shape, count) for shape, count in shapes if count]


def _position_tables(
    architecture: EncoderDecoderArchitecture, chunk: ChunkShape, tp: int
) -> list[tuple[tuple[int, ...], int]]:
    """List an encoder-decoder's tables of positions: learned with the embedding, relative on every chunk."""
    if architecture.positions == "relative":
        return [((architecture.relative_attention_num_buckets, architecture.num_attention_heads // tp), 2)]
    return [((architecture.max_positions or 0, architecture.hidden_size), 2 if chunk.embeds else 0)]


@dataclass(frozen=True)
class RankSize:
    """Parameters of one rank of a stage."""

    parameters: int
    factored_numbers: int
    """Numbers of a state that keeps rows and columns (Adafactor)."""
    largest: int
    """Of one tensor."""


@lru_cache(maxsize=16384)
def rank_size(architecture: Architecture, chunks: tuple[ChunkShape, ...], *, tp: int, is_whole: bool) -> RankSize:
    """Count what a rank of a stage holds."""
    shapes = [entry for chunk in chunks for entry in chunk_parameters(architecture, chunk, tp=tp, is_whole=is_whole)]
    return RankSize(
        parameters=count_parameters(shapes),
        factored_numbers=sum(sum(shape) * count for shape, count in shapes),
        largest=max((prod(shape) for shape, _ in shapes), default=0),
    )


def count_parameters(shapes: list[tuple[tuple[int, ...], int]]) -> int:
    """Return how many numbers a list of (shape, how many) has."""
    return sum(prod(shape) * count for shape, count in shapes)
