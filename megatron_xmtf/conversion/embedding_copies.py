"""Tensors that a model may store although they are its embedding again: the output layer, the stacks' own tables.

`transformers` ties an output layer to the embedding unless the two differ in the files; so does this.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_xmtf.checkpoint.row_ranges import row_ranges
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, has_weights, read_config
from megatron_xmtf.conversion.mapping import FamilyMapping, MatchedParameter
from megatron_xmtf.conversion.t5_mapping import EMBEDDING_NAMES, HEAD_NAME
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.files import require_directory
from megatron_xmtf.models.architecture import Architecture, architecture_from_hf

__all__ = ["check_copies", "directory_architecture", "model_architecture"]


def model_architecture(model: HuggingFaceModel) -> Architecture:
    """Return the architecture of a model, its output layer judged by its files.

    Raises:  CheckpointError: config.json describes no model that is offered.
    """
    embedding = next((name for name in EMBEDDING_NAMES if name in model.tensors), None)
    if model.config.get("model_type") == "bloom" or embedding is None:
        return architecture_from_hf(model.config)
    head_differs = HEAD_NAME in model.tensors and not same_tensor(model, HEAD_NAME, embedding)
    return architecture_from_hf(model.config, head_differs=head_differs)


def directory_architecture(directory: Path | str) -> Architecture:
    """Return the architecture of a model directory; by its config.json alone where it holds no weights.

    Raises:  MissingError: no such directory or no config.json. CheckpointError: as `model_architecture`.
    """
    if has_weights(Path(directory)):
        with HuggingFaceModel(directory) as model:
            return model_architecture(model)
    return architecture_from_hf(read_config(require_directory(directory)))


def check_copies(model: HuggingFaceModel, mapping: FamilyMapping, parameters: list[MatchedParameter]) -> None:
    """Accept a stored copy of the embedding only where it is that, bit by bit.

    Raises:  CheckpointError: names the copy that differs, or the weight that should be zero and is not.
    """
    [embedding] = [parameter.hf[0] for parameter in parameters if parameter.ours == mapping.embedding]
    for name in mapping.copies:
        if name != embedding and name in model.tensors and not same_tensor(model, name, embedding):
            raise CheckpointError(
                f"{model.tensors[name].path}: {name} differs from {embedding}, and {mapping.description} has one "
                "table for both, so it cannot be kept. Remove it if it is not meant to be used."
            )
    _check_zeros(model, mapping)


def _check_zeros(model: HuggingFaceModel, mapping: FamilyMapping) -> None:
    """Check that weights without a counterpart here add nothing.

    Raises:  CheckpointError: one is not zero.
    """
    for name in mapping.zeros:
        if name in model.tensors and bool(model.read(name).any()):
            raise CheckpointError(
                f"{model.tensors[name].path}: {name} is not zero, and {mapping.description} has nothing that it "
                "could become."
            )


def same_tensor(model: HuggingFaceModel, left: str, right: str) -> bool:
    """Whether two tensors are equal in type, shape and every value; a few rows at a time."""
    first, second = model.tensors[left], model.tensors[right]
    if first.shape != second.shape or first.dtype != second.dtype or not first.shape:
        return False
    row_bytes = torch.Size(first.shape[1:]).numel() * first.dtype.itemsize
    ranges = row_ranges(first.shape[0], row_bytes)
    return all(torch.equal(model.read(left, rows=rows), model.read(right, rows=rows)) for rows in ranges)
