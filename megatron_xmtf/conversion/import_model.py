"""Hugging Face model -> checkpoint: files checked, every tensor matched, padded, written a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.manifest import checkpoint_directory
from megatron_xmtf.checkpoint.streamed_write import StreamedWriter, row_ranges
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, copy_side_files, dtype_name
from megatron_xmtf.conversion.mapping import FAMILIES, FamilyMapping, MatchedParameter, check_shapes, match_names
from megatron_xmtf.errors import CheckpointError, NonFiniteError
from megatron_xmtf.models.architecture import architecture_from_hf
from megatron_xmtf.progress import Progress

__all__ = ["ImportedModel", "convert_part", "import_hugging_face", "match_model"]


@dataclass(frozen=True)
class ImportedModel:
    """What an import did."""

    checkpoint: Path
    tensors: int
    parameters: int
    """Numbers in the Hugging Face model; padding is not counted."""
    bytes: int
    """Bytes read."""
    dtype: str


def import_hugging_face(
    directory: Path | str, output: Path | str, *, dtype: torch.dtype | None = None
) -> ImportedModel:
    """Turn a Hugging Face model into a checkpoint of step 0.

    Memory: one chunk of `streamed_write.CHUNK_BYTES`, whatever the size of the model.

    Args:    dtype: type to store; None keeps each tensor's own.
    Raises:  CheckpointError: unknown architecture; tensors missing, unexpected, of another shape.
             NonFiniteError: NaN or Inf in a weight, also one made by the change of type.
             ConfigError: `output` exists. On any error nothing is left at `output`.
    """
    output = Path(output)
    with HuggingFaceModel(directory) as model:
        architecture = architecture_from_hf(model.config)
        parameters = match_model(model)
        stored = {dtype_name(dtype or model.tensors[parameter.hf].dtype) for parameter in parameters}
        stored_name = stored.pop() if len(stored) == 1 else "mixed"
        total = sum(_bytes(model, parameter) for parameter in parameters)
        with checkpoint_directory(
            output,
            step=0,
            architecture=architecture.to_mapping(),
            dtype=stored_name,
            config=None,
            consumed_rows=0,
            contents=["model"],
        ) as temporary:
            with (
                Progress("import", total=round(total / 1e6), unit="MB") as progress,
                StreamedWriter(temporary) as writer,
            ):
                for parameter in parameters:
                    _import_tensor(model, parameter, writer, progress, dtype=dtype)
                writer.finish()
            copy_side_files(model.directory, temporary / "hf")
    count = sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    return ImportedModel(output, len(parameters), count, total, stored_name)


def match_model(model: HuggingFaceModel) -> list[MatchedParameter]:
    """Match every tensor of a Hugging Face model to ours, by name and shape.

    Raises:  CheckpointError: missing, unexpected or misshaped tensors, or a head that is not the embedding.
    """
    architecture = architecture_from_hf(model.config)
    mapping = FAMILIES[architecture.family]
    what = str(model.directory)
    parameters = match_names(mapping, architecture, names=model.tensors, what=what, side="hf")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    check_shapes(parameters, shapes, what=what, side="hf")
    _check_tied_head(model, mapping, parameters)
    return parameters


def convert_part(part: torch.Tensor, *, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """Change the type of some rows of a weight.

    Raises:  NonFiniteError: NaN or Inf, before or after.
    """
    _check_finite(part, f"{name} holds NaN or Inf; a model with such weights cannot be used.")
    if dtype is None or dtype == part.dtype:
        return part
    converted = part.to(dtype)
    _check_finite(converted, f"{name}: its largest weight {part.abs().max():.3g} does not fit {dtype_name(dtype)}.")
    return converted


def _check_finite(part: torch.Tensor, message: str) -> None:
    # The extremes carry NaN and Inf along; `isfinite` of a whole tensor would make a copy of it.
    if part.numel() and not torch.isfinite(torch.stack(torch.aminmax(part))).all():
        raise NonFiniteError(message)


def _import_tensor(
    model: HuggingFaceModel,
    parameter: MatchedParameter,
    writer: StreamedWriter,
    progress: Progress,
    *,
    dtype: torch.dtype | None,
) -> None:
    rows, padded_rows = parameter.shape[0], parameter.padded_shape[0]
    row_bytes = _bytes(model, parameter) // rows
    rest = (0,) * (len(parameter.shape) - 1)
    written_dtype = dtype or model.tensors[parameter.hf].dtype
    for start, end in row_ranges(rows, row_bytes):
        part = convert_part(model.read(parameter.hf, rows=(start, end)), dtype=dtype, name=parameter.hf)
        writer.write(parameter.ours, part, offsets=(start, *rest), shape=parameter.padded_shape)
        progress.advance(round(end * row_bytes / 1e6) - round(start * row_bytes / 1e6))
    for start, end in row_ranges(padded_rows - rows, row_bytes):
        zeros = torch.zeros((end - start, *parameter.shape[1:]), dtype=written_dtype)
        writer.write(parameter.ours, zeros, offsets=(rows + start, *rest), shape=parameter.padded_shape)


def _bytes(model: HuggingFaceModel, parameter: MatchedParameter) -> int:
    return torch.Size(parameter.shape).numel() * model.tensors[parameter.hf].dtype.itemsize


def _check_tied_head(model: HuggingFaceModel, mapping: FamilyMapping, parameters: list[MatchedParameter]) -> None:
    """Accept a stored output layer only where it is the embedding, bit by bit."""
    head = model.tensors.get(mapping.tied_head)
    if head is None:
        return
    embedding = next(parameter for parameter in parameters if parameter.ours == mapping.embedding)
    same = head.shape == embedding.shape and head.dtype == model.tensors[embedding.hf].dtype
    row_bytes = _bytes(model, embedding) // embedding.shape[0]
    for rows in row_ranges(embedding.shape[0], row_bytes):
        same = same and torch.equal(model.read(mapping.tied_head, rows=rows), model.read(embedding.hf, rows=rows))
    if not same:
        raise CheckpointError(
            f"{model.directory}: {mapping.tied_head} differs from {embedding.hf}; the output layer is always the "
            "embedding here, so it cannot be kept. Remove it if it is not meant to be used."
        )
