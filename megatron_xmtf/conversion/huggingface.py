"""Hugging Face model -> checkpoint of step 0, streamed a few rows at a time, bit by bit.

    files checked, every tensor matched, assembled (`mapping`), padded; written by `checkpoint_parts`

Nothing exists under the output's name before all of it is on the disk. The way back is `huggingface_export`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_xmtf.conversion.checkpoint_parts import CheckpointDescription, write_checkpoint
from megatron_xmtf.conversion.embedding_copies import check_copies, model_architecture
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.finite import change_dtype, check_finite
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, check_side_files, copy_side_files, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter, check_shapes, match_names
from megatron_xmtf.conversion.tensor_source import TensorSource, matched_tensor
from megatron_xmtf.conversion.torch_file import check_bytes
from megatron_xmtf.errors import CheckpointError

__all__ = ["HuggingFaceSource", "ImportedModel", "import_huggingface", "match_model"]


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


def import_huggingface(
    directory: Path | str,
    output: Path | str,
    *,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    restart: bool = False,
) -> ImportedModel:
    """Turn a Hugging Face model into a checkpoint of step 0.

    Memory: a few times `row_ranges.CHUNK_BYTES` in each process, whatever the size of the model.

    Args:    dtype: type to store; None keeps each tensor's own. workers, restart: as in `write_checkpoint`.
    Raises:  CheckpointError: unknown architecture; tensors missing, unexpected, of another shape; parts of one tensor
             of ours in several types.
             NonFiniteError: NaN or Inf in a weight, also one made by the change of type.
             ConfigError: `output` exists. On any error nothing is left at `output`.
    """
    output = Path(output)
    open_source = partial(HuggingFaceSource, Path(directory), dtype)
    with open_source() as source:
        match_model(source.model)
        check_side_files(source.model.directory)
        total = sum(tensor.nbytes for tensor in source.model.tensors.values())
        written = write_checkpoint(
            output,
            source,
            open_source,
            describe=CheckpointDescription(source.architecture.to_mapping()),
            add_files=lambda path: copy_side_files(source.model.directory, path / "hf"),
            settings={"dtype": str(dtype)},
            workers=workers,
            restart=restart,
        )
        count = sum(torch.Size(parameter.shape).numel() for parameter in source.parameters.values())
    return ImportedModel(output, len(source.parameters), count, total, written.dtype)


class HuggingFaceSource(TensorSource):
    """An opened Hugging Face model as the tensors of a checkpoint; a context manager."""

    def __init__(self, directory: Path, dtype: torch.dtype | None) -> None:
        self.model = HuggingFaceModel(directory)
        self.architecture = model_architecture(self.model)
        # Copies of the embedding are compared once, by `import_huggingface`, and not in every process.
        matched = match_model(self.model, copies=False)
        self.parameters = {parameter.ours: parameter for parameter in sorted(matched, key=self._place)}
        self.tensors = [
            matched_tensor(parameter, dtype or _stored_dtype(self.model, parameter))
            for parameter in self.parameters.values()
        ]
        self._types = {tensor.name: tensor.dtype for tensor in self.tensors}

    def _place(self, parameter: MatchedParameter) -> tuple[str, int]:
        """Return file and byte where a parameter begins, so that files are read from their beginning to their end."""
        first = self.model.tensors[parameter.hf[0]]
        return str(first.path), first.offset or 0

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return sorted({tensor.path for tensor in self.model.tensors.values()})

    def files_to_check(self, name: str) -> list[Path]:
        """Return the pickles that a parameter is in; safetensors files hold no checksums."""
        return [
            path
            for path in (self.model.tensors[part].path for part in self.parameters[name].hf)
            if self.model.has_checksums(path)
        ]

    def check(self, path: Path) -> None:
        """Compare a pickle with its checksums, as `TensorSource.check`."""
        check_bytes(path)

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return our rows [first, last) of a parameter, assembled out of the model's tensors.

        Raises:  NonFiniteError: NaN or Inf. CorruptCheckpointError: a file cannot be read.
        """
        parameter, dtype = self.parameters[name], self._types[name]
        start, end = rows
        if start >= parameter.shape[0]:
            return torch.zeros((end - start, *parameter.shape[1:]), dtype=dtype)
        if len(parameter.hf) == 1:
            return self._read(parameter.hf[0], rows, dtype)
        part = torch.empty((end - start, *parameter.shape[1:]), dtype=dtype)
        for source_name, source_rows, view in parameter.source_views(part, start=start):
            view.copy_(self._read(source_name, source_rows, dtype).view(view.shape))
        return part

    def _read(self, name: str, rows: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        where = f"{self.model.tensors[name].path}: {name}"
        part = self.model.read(name, rows=rows, see=partial(check_finite, name=where))
        return change_dtype(part, dtype, name=where)


def match_model(model: HuggingFaceModel, *, copies: bool = True) -> list[MatchedParameter]:
    """Match every tensor of a Hugging Face model to ours, by name and shape.

    Args:    copies: compare copies of the embedding with it, which reads all of them.
    Raises:  CheckpointError: missing, unexpected or misshaped tensors, or a copy of the embedding that differs from it.
    """
    mapping, what = mapping_of(model_architecture(model)), str(model.listing)
    parameters = match_names(mapping, names=model.tensors, what=what, side="hf")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    files = {name: tensor.path.name for name, tensor in model.tensors.items()}
    check_shapes(parameters, shapes, what=what, side="hf", files=files)
    if copies:
        check_copies(model, mapping, parameters)
    return parameters


def _stored_dtype(model: HuggingFaceModel, parameter: MatchedParameter) -> torch.dtype:
    """Return the type that all parts of a parameter are stored in.

    Raises:  CheckpointError: they differ; one of them would not come back as it was.
    """
    types = {name: model.tensors[name].dtype for name in parameter.hf}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} is {dtype_name(dtype)}" for name, dtype in types.items())
        files = ", ".join(sorted({str(model.tensors[name].path) for name in parameter.hf}))
        raise CheckpointError(
            f"{files}: {listed}; they are one tensor here ({parameter.ours}) and have one type. "
            "Give the type to convert all weights to (--dtype)."
        )
    return next(iter(types.values()))
