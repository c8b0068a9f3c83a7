"""Is a checkpoint the same model as a Hugging Face directory? Weights bit by bit, then logits.

Weights are read on both sides without any engine. Logits are those of our engine, packed, at any parallel layout,
against `transformers` with each prompt alone, both computing in fp32 on the same prompts in eight scripts.
Where the two sides store different types (an import or export with `--dtype`), both are rounded to the narrower one.
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
from megatron_xmtf.checkpoint.safe_read import CheckpointReader
from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.conversion.embedding_copies import model_architecture
from megatron_xmtf.conversion.huggingface import match_model
from megatron_xmtf.conversion.huggingface_export import match_checkpoint
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.architecture import architecture_from_mapping
from megatron_xmtf.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DifferingTensor", "LogitsComparison", "WeightsComparison", "compare_logits", "compare_weights"]

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
class DifferingTensor:
    """One weight that is not bit-identical."""

    name: str
    max_abs_difference: float


@dataclass(frozen=True)
class WeightsComparison:
    """Outcome of `compare_weights`."""

    identical: bool
    tensors: int
    differing: tuple[DifferingTensor, ...]
    checkpoint_dtype: str
    hf_dtype: str


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


def compare_weights(checkpoint: Path | str, directory: Path | str) -> WeightsComparison:
    """Compare every weight, a few rows at a time.

    Raises:  CheckpointError: the two are different models (another architecture, missing or unexpected tensors).
    """
    checkpoint = Path(checkpoint)
    manifest = open_manifest(checkpoint)
    with HuggingFaceModel(directory) as model, CheckpointReader(checkpoint) as reader:
        theirs = match_model(model)
        ours = {parameter.ours: parameter for parameter in match_checkpoint(reader, manifest)}
        if [(p.ours, p.shape) for p in theirs] != [(p.ours, p.shape) for p in ours.values()]:
            raise CheckpointError(
                f"{checkpoint} is a {architecture_from_mapping(manifest.architecture)}, "
                f"{model.directory} a {model_architecture(model)}."
            )
        found: dict[str, float | None] = {}
        with Progress("verify weights", total=len(theirs), unit="tensors") as progress:
            for parameter in theirs:
                found.update(_compare_parameter(reader, model, parameter))
                progress.advance()
        hf_types = {dtype_name(tensor.dtype) for tensor in model.tensors.values()}
    hf_dtype = hf_types.pop() if len(hf_types) == 1 else "mixed"
    differing = tuple(DifferingTensor(name, value) for name, value in found.items() if value is not None)
    return WeightsComparison(not differing, len(found), differing, manifest.dtype, hf_dtype)


def _compare_parameter(
    reader: CheckpointReader, model: HuggingFaceModel, parameter: MatchedParameter
) -> dict[str, float | None]:
    """Compare the Hugging Face tensors of one parameter: name -> largest difference, None where no bit differs."""
    found: dict[str, float | None] = dict.fromkeys(parameter.hf)
    for start, end in reader.row_parts(parameter.ours, rows=parameter.shape[0]):
        part = reader.read(parameter.ours, rows=(start, end))
        for name, rows, view in parameter.source_views(part, start=start):
            dtype = narrower(part.dtype, model.tensors[name].dtype)
            left, right = view.to(dtype), model.read(name, rows=rows).to(dtype).view(view.shape)
            if not _same_bits(left, right):
                difference = float((left.float() - right.float()).abs().max())
                found[name] = max(found[name] or 0.0, difference)
    return found


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
    Raises:  ConfigError: the layout does not fit the model. CheckpointError: another model.
    """
    from megatron_xmtf.parallel.launch import run_ranks

    checkpoint, directory = Path(checkpoint), Path(directory)
    with HuggingFaceModel(directory) as model:
        vocab_size = model_architecture(model).vocab_size
        stored = {tensor.dtype for tensor in model.tensors.values()}
    with CheckpointReader(checkpoint) as reader:
        weights = match_checkpoint(reader, open_manifest(checkpoint))
        stored |= {reader.tensors[parameter.ours].dtype for parameter in weights}
    rounded = narrower(*stored)
    prompts, kind = _prompt_ids(directory, vocab_size)
    [reference] = run_ranks(_reference_logits, world_size=1, arguments=(directory, prompts, rounded))
    arguments = (checkpoint, parallel, prompts, reference, rounded)
    sums: list[tuple[float, float, int]] = run_ranks(_own_differences, world_size=world_size, arguments=arguments)[0]
    largest, total, count = (
        max(entry[0] for entry in sums),
        sum(entry[1] for entry in sums),
        sum(entry[2] for entry in sums),
    )
    std = float(np.concatenate([logits.reshape(-1) for logits in reference]).std(dtype=np.float64))
    limit = tolerance * max(1.0, std)
    return LogitsComparison(largest <= limit, largest, total / count, limit, std, count // vocab_size, kind)


def narrower(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type with the fewest mantissa bits: bfloat16 before float16 before float32."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one type are equal in every bit, so that -0 is not 0 and NaN is NaN."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


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


def _reference_logits(directory: Path, prompts: list[list[int]], rounded: torch.dtype) -> list[NDArray[np.float32]]:
    """Return fp32 logits [tokens, vocab] of each prompt from `transformers`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    _round_parameters([model], rounded)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


def _own_differences(
    checkpoint: Path,
    parallel: ParallelConfig,
    prompts: list[list[int]],
    reference: list[NDArray[np.float32]],
    rounded: torch.dtype,
) -> list[tuple[float, float, int]]:
    """Run in every rank: compute logits of packed prompts; return (max, sum, count) of |difference| a micro-batch."""
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
        batches = [build_batch([row], normalization="target_token") for row in _packed(prompts)]

        def reduce(batch: Batch, logits: Tensor) -> tuple[float, float, int]:
            return _differences(batch.rows[0], logits[0].cpu().numpy(), reference)

        found: list[tuple[float, float, int]] = run_logits(chunks, batches, reduce)
        return found
    finally:
        destroy_parallel()


def _packed(prompts: list[list[int]]) -> list[Row]:
    """Pack the prompts into rows, several to a row, so that leaking between segments would be seen."""
    sequence_length = -(-max(map(len, prompts)) // 64) * 64
    return pack_examples([((), ids) for ids in prompts], sequence_length=sequence_length, pad_id=0)


def _differences(
    row: Row, logits: NDArray[np.float32], reference: list[NDArray[np.float32]]
) -> tuple[float, float, int]:
    """Compare one row: logits [sequence, vocab] against those of each of its prompts."""
    largest, total, count = 0.0, 0.0, 0
    for segment, prompt in enumerate(row.example_ids.tolist(), start=1):
        # The last token of a full row is only a label: it has no logits.
        places = np.flatnonzero(row.segment_ids[:-1] == segment)
        difference = np.abs(logits[places] - reference[prompt][: len(places)])
        # A NaN on either side must not compare as small.
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        total += float(difference.sum(dtype=np.float64))
        count += difference.size
    return largest, total, count
