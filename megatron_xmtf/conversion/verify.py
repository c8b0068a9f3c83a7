"""Does a checkpoint hold the weights of a Hugging Face directory, bit by bit?

Both sides are read a few rows at a time, without any engine. Where they store different types (an import or export with
`--dtype`), both are rounded to the narrower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES
from megatron_xmtf.conversion.embedding_copies import model_architecture
from megatron_xmtf.conversion.huggingface import match_model
from megatron_xmtf.conversion.huggingface_export import match_checkpoint
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.architecture import architecture_from_mapping
from megatron_xmtf.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DifferingTensor", "WeightsComparison", "compare_weights", "narrower"]


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
    for start, end in parameter.row_ranges(reader.row_bytes(parameter.ours), chunk_bytes=CHUNK_BYTES):
        part = reader.read(parameter.ours, rows=(start, end))
        for name, rows, view in parameter.source_views(part, start=start):
            dtype = narrower(part.dtype, model.tensors[name].dtype)
            left, right = view.to(dtype), model.read(name, rows=rows).to(dtype).view(view.shape)
            if not _same_bits(left, right):
                difference = float((left.float() - right.float()).abs().max())
                found[name] = max(found[name] or 0.0, difference)
    return found


def narrower(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type with the fewest mantissa bits: bfloat16 before float16 before float32."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one type are equal in every bit, so that -0 is not 0 and NaN is NaN."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
