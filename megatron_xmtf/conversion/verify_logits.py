"""Does a checkpoint compute what a Hugging Face directory computes? Logits on fixed prompts.

Logits are those of our engine, packed, at any parallel layout, against `transformers` with each prompt alone, both
computing in fp32 on the same prompts in eight scripts. The decoder of an encoder-decoder is given the next prompt.
Where the two sides store different types, both are rounded to the narrower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.conversion.embedding_copies import model_architecture
from megatron_xmtf.conversion.huggingface_export import match_checkpoint
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel
from megatron_xmtf.conversion.verify import narrower
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch, build_encoder_decoder_batch
from megatron_xmtf.data.pair_rows import join_pairs, pack_pairs
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.models.architecture import Architecture, EncoderDecoderArchitecture, architecture_from_mapping

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LogitsComparison", "compare_logits"]

Question = tuple[list[int], list[int]]
"""Token ids that an encoder reads, and those behind them; without an encoder the first are none."""

PROMPTS = (
    "The capital of France is",
    "Translate to Swahili: Good morning, how are you?",
    "Résumez en une phrase : le chat dort sur le tapis pendant que la pluie tombe.",
    "¿Cuál es la capital de Perú?",
    "Вопрос: сколько дней в неделе? Ответ:",
    "ما هي عاصمة مصر؟",
    "भारत की राजधानी क्या है?",
    "中国的首都是哪里？",
    "日本の首都はどこですか。",
    "ประเทศไทยมีกี่จังหวัด",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
"""Fixed, so that two runs are comparable; many scripts, so that many rows of the embedding are read."""
PROMPT_TOKENS = 48
"""A longer prompt is cut: logits of a large vocabulary are 1 MB a token."""


@dataclass(frozen=True)
class LogitsComparison:
    """Outcome of `compare_logits`. Differences are absolute, in units of logits."""

    within_tolerance: bool
    max_abs_difference: float
    mean_abs_difference: float
    limit: float
    """tolerance x max(1, standard deviation of the reference's logits)."""
    reference_std: float
    positions: int
    """Tokens whose logits were compared."""
    prompts: str
    """`fixed multilingual prompts`, or `random ids` where the directory has no tokenizer.json."""


def compare_logits(
    checkpoint: Path | str,
    directory: Path | str,
    *,
    parallel: ParallelConfig,
    world_size: int,
    tolerance: float = 1e-4,
) -> LogitsComparison:
    """Run both models on the same prompts, each in forked ranks of its own.

    Args:    parallel, world_size: layout of our engine. tolerance: see `LogitsComparison.limit`.
    Raises:  ConfigError: the layout does not fit the model, or this is a prefix-LM. CheckpointError: another model.
    """
    from megatron_xmtf.parallel.launch import run_ranks

    checkpoint, directory = Path(checkpoint), Path(directory)
    manifest = open_manifest(checkpoint)
    if attends_prefix(checkpoint, manifest):
        raise ConfigError(
            f"{checkpoint} reads inputs in both directions (batch.prefix_lm), transformers reads them causally: their "
            "logits differ by design. Compare the weights alone, with --weights-only."
        )
    with HuggingFaceModel(directory) as model:
        architecture = model_architecture(model)
        stored = {tensor.dtype for tensor in model.tensors.values()}
    with CheckpointReader(checkpoint) as reader:
        weights = match_checkpoint(reader, manifest)
        stored |= {reader.tensors[parameter.ours].dtype for parameter in weights}
    rounded = narrower(*stored)
    prompts, kind = _prompt_ids(directory, architecture.vocab_size)
    two_sided = isinstance(architecture, EncoderDecoderArchitecture)
    others = [*prompts[1:], *prompts[:1]] if two_sided else prompts
    questions = [(prompt if two_sided else [], other) for prompt, other in zip(prompts, others, strict=True)]
    [reference] = run_ranks(_reference_logits, world_size=1, arguments=(directory, architecture, questions, rounded))
    arguments = (checkpoint, parallel, questions, reference, rounded)
    sums: list[tuple[float, float, int]] = run_ranks(_own_differences, world_size=world_size, arguments=arguments)[0]
    largest, total, count = (
        max(entry[0] for entry in sums),
        sum(entry[1] for entry in sums),
        sum(entry[2] for entry in sums),
    )
    std = float(np.concatenate([logits.reshape(-1) for logits in reference]).std(dtype=np.float64))
    limit = tolerance * max(1.0, std)
    return LogitsComparison(
        largest <= limit, largest, total / count, limit, std, count // architecture.vocab_size, kind
    )


def _prompt_ids(directory: Path, vocab_size: int) -> tuple[list[list[int]], str]:
    if (directory / "tokenizer.json").is_file():
        encoded = Tokenizer.load(directory).encode_batch(PROMPTS)
        cut = [[token for token in ids[:PROMPT_TOKENS] if token < vocab_size] for ids in encoded]
        return [ids for ids in cut if ids], "fixed multilingual prompts"
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, PROMPT_TOKENS, len(PROMPTS))
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths], "random ids"


def _round_parameters(modules: Sequence[torch.nn.Module], dtype: torch.dtype) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.to(dtype))


def _reference_logits(
    directory: Path, architecture: Architecture, questions: list[Question], rounded: torch.dtype
) -> list[NDArray[np.float32]]:
    """Return fp32 logits [tokens, vocab] of each question from `transformers`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    two_sided = isinstance(architecture, EncoderDecoderArchitecture)
    auto_class = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
    model = auto_class.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    _round_parameters([model], rounded)
    with torch.no_grad():
        if not isinstance(architecture, EncoderDecoderArchitecture):
            return [model(torch.tensor([ids])).logits[0].numpy() for _, ids in questions]
        start = architecture.decoder_start_token_id
        return [
            model(input_ids=torch.tensor([inputs]), decoder_input_ids=torch.tensor([[start, *targets[:-1]]]))
            .logits[0]
            .numpy()
            for inputs, targets in questions
        ]


def _own_differences(
    checkpoint: Path,
    parallel: ParallelConfig,
    questions: list[Question],
    reference: list[NDArray[np.float32]],
    rounded: torch.dtype,
) -> list[tuple[float, float, int]]:
    """Run in every rank: compute logits of packed questions; return (max, sum, count) of |difference| a micro-batch."""
    from megatron_xmtf.checkpoint.sharded import load_model_weights
    from megatron_xmtf.models.forward import run_logits
    from megatron_xmtf.models.registry import build_model
    from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel

    initialize_parallel(parallel, seed=0)
    try:
        architecture = architecture_from_mapping(open_manifest(checkpoint).architecture)
        chunks = build_model(architecture, parallel=parallel)
        load_model_weights(chunks, checkpoint)
        _round_parameters(chunks, rounded)

        def reduce(batch: Batch | EncoderDecoderBatch, logits: Tensor) -> tuple[float, float, int]:
            [row] = batch.rows
            return _differences(row.example_ids, batch.segment_ids[0].cpu().numpy(), logits[0].cpu().numpy(), reference)

        found: list[tuple[float, float, int]] = run_logits(chunks, _packed(architecture, questions), reduce)
        return found
    finally:
        destroy_parallel()


def _packed(architecture: Architecture, questions: list[Question]) -> Sequence[Batch | EncoderDecoderBatch]:
    """Pack the questions into rows, several to a row, so that leaking between segments would be seen."""
    inputs, targets = (-(-max(map(len, side)) // 64) * 64 for side in zip(*questions, strict=True))
    if not isinstance(architecture, EncoderDecoderArchitecture):
        rows = pack_examples(questions, sequence_length=targets, pad_id=0)
        return [build_batch([row], normalization="target_token") for row in rows]
    lengths = {"encoder_length": 2 * inputs, "decoder_length": 2 * targets}
    dealt = pack_pairs([(len(first), len(second)) for first, second in questions], **lengths)
    start = architecture.decoder_start_token_id
    joined = [
        join_pairs([questions[i] for i in row], row, pad_id=0, decoder_start_id=start, **lengths) for row in dealt
    ]
    return [build_encoder_decoder_batch([row], normalization="target_token") for row in joined]


def _differences(
    examples: NDArray[np.int64],
    segment_ids: NDArray[np.int64],
    logits: NDArray[np.float32],
    reference: list[NDArray[np.float32]],
) -> tuple[float, float, int]:
    """Compare one row: logits [sequence, vocab] against those of each of its questions."""
    largest, total, count = 0.0, 0.0, 0
    for segment, question in enumerate(examples.tolist(), start=1):
        # The last token of a full row of one sequence is only a label: it has no logits.
        places = np.flatnonzero(segment_ids == segment)
        difference = np.abs(logits[places] - reference[question][: len(places)])
        # A NaN on either side must not compare as small.
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        total += float(difference.sum(dtype=np.float64))
        count += difference.size
    return largest, total, count
