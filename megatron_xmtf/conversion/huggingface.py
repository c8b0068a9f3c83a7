"""Hugging Face model -> checkpoint of step 0, streamed a few rows at a time, bit by bit.

    files checked, every tensor matched, assembled (`mapping`), padded, written as torch_dist chunks

Nothing exists under the output's name before all of it is on the disk. The way back is `huggingface_export`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.manifest import checkpoint_directory
from megatron_xmtf.checkpoint.streamed_write import CHUNK_BYTES, StreamedWriter, row_ranges
from megatron_xmtf.conversion.embedding_copies import check_copies, model_architecture
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, copy_side_files, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter, check_shapes, match_names
from megatron_xmtf.errors import CheckpointError, NonFiniteError
from megatron_xmtf.progress import Progress

__all__ = ["ImportedModel", "convert_part", "import_huggingface", "match_model"]


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


def import_huggingface(directory: Path | str, output: Path | str, *, dtype: torch.dtype | None = None) -> ImportedModel:
    """Turn a Hugging Face model into a checkpoint of step 0.

    Memory: one chunk of `streamed_write.CHUNK_BYTES`, twice where it is assembled, whatever the size of the model.

    Args:    dtype: type to store; None keeps each tensor's own.
    Raises:  CheckpointError: unknown architecture; tensors missing, unexpected, of another shape; parts of one tensor
             of ours in several types.
             NonFiniteError: NaN or Inf in a weight, also one made by the change of type.
             ConfigError: `output` exists. On any error nothing is left at `output`.
    """
    output = Path(output)
    with HuggingFaceModel(directory) as model:
        architecture = model_architecture(model)
        parameters = match_model(model)
        types = {parameter.ours: dtype or _stored_dtype(model, parameter) for parameter in parameters}
        stored = {dtype_name(stored_dtype) for stored_dtype in types.values()}
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
                    _import_tensor(model, parameter, writer, progress, dtype=types[parameter.ours])
                writer.finish()
            copy_side_files(model.directory, temporary / "hf")
    count = sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    return ImportedModel(output, len(parameters), count, total, stored_name)


def match_model(model: HuggingFaceModel) -> list[MatchedParameter]:
    """Match every tensor of a Hugging Face model to ours, by name and shape.

    Raises:  CheckpointError: missing, unexpected or misshaped tensors, or a copy of the embedding that differs from it.
    """
    mapping, what = mapping_of(model_architecture(model)), str(model.directory)
    parameters = match_names(mapping, names=model.tensors, what=what, side="hf")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    check_shapes(parameters, shapes, what=what, side="hf")
    check_copies(model, mapping, parameters)
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
    dtype: torch.dtype,
) -> None:
    rows, padded_rows = parameter.shape[0], parameter.padded_shape[0]
    row_bytes = _bytes(model, parameter) // rows
    rest = (0,) * (len(parameter.shape) - 1)
    for start, end in parameter.row_ranges(row_bytes, chunk_bytes=CHUNK_BYTES):
        part = _read_rows(model, parameter, rows=(start, end), dtype=dtype)
        writer.write(parameter.ours, part, offsets=(start, *rest), shape=parameter.padded_shape)
        progress.advance(round(end * row_bytes / 1e6) - round(start * row_bytes / 1e6))
    for start, end in row_ranges(padded_rows - rows, row_bytes, chunk_bytes=CHUNK_BYTES):
        zeros = torch.zeros((end - start, *parameter.shape[1:]), dtype=dtype)
        writer.write(parameter.ours, zeros, offsets=(rows + start, *rest), shape=parameter.padded_shape)


def _read_rows(
    model: HuggingFaceModel, parameter: MatchedParameter, *, rows: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return our rows [start, end) of a parameter, assembled out of the model's tensors."""
    start, end = rows
    if len(parameter.hf) == 1:
        return convert_part(model.read(parameter.hf[0], rows=rows), dtype=dtype, name=parameter.hf[0])
    part = torch.empty((end - start, *parameter.shape[1:]), dtype=dtype)
    for name, source_rows, view in parameter.source_views(part, start=start):
        view.copy_(convert_part(model.read(name, rows=source_rows), dtype=dtype, name=name).view(view.shape))
    return part


def _stored_dtype(model: HuggingFaceModel, parameter: MatchedParameter) -> torch.dtype:
    """Return the type that all parts of a parameter are stored in.

    Raises:  CheckpointError: they differ; one of them would not come back as it was.
    """
    types = {name: model.tensors[name].dtype for name in parameter.hf}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} is {dtype_name(dtype)}" for name, dtype in types.items())
        raise CheckpointError(
            f"{model.directory}: {listed}; they are one tensor here ({parameter.ours}) and have one type. "
            "Give the type to convert all weights to (--dtype)."
        )
    return next(iter(types.values()))


def _bytes(model: HuggingFaceModel, parameter: MatchedParameter) -> int:
    return torch.Size(parameter.shape).numel() * model.tensors[parameter.hf[0]].dtype.itemsize
