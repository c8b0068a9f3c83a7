"""Checkpoint of a BLOOM -> BigScience's Megatron-DeepSpeed layer files, bit by bit, a few rows at a time.

    DIR/latest                       names the step
    DIR/global_step7/layer_XX-model_TT-model_states.pt    weights of tensor-parallel rank TT (`deepspeed_layout`)
    DIR/global_step7/mp_rank_MM_model_states.pt           settings alone; no optimizer state
    DIR/hf/                          config.json and tokenizer files of the checkpoint

The converters of `transformers` and Megatron-DeepSpeed read the layer files; its trainer loads the step with
--no-load-optim. Pipeline stages share no file, so their number changes the count of settings files alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_descriptions, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES, row_ranges
from megatron_xmtf.conversion.deepspeed_layout import layer_and_key
from megatron_xmtf.conversion.deepspeed_settings import write_settings
from megatron_xmtf.conversion.finite import convert_part
from megatron_xmtf.conversion.huggingface_export import match_checkpoint
from megatron_xmtf.conversion.huggingface_model import copy_side_files, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.files import atomic_directory
from megatron_xmtf.models.architecture import architecture_from_mapping
from megatron_xmtf.models.bloom_architecture import BloomArchitecture
from megatron_xmtf.models.split_sizes import VOCAB_DIVISOR, check_tensor_parallel
from megatron_xmtf.progress import Progress

__all__ = ["ExportedDeepSpeed", "export_deepspeed"]


@dataclass(frozen=True)
class ExportedDeepSpeed:
    """What an export did."""

    directory: Path
    checkpoint: Path
    step: int
    tensors: int
    parameters: int
    """Numbers in the model, once each; padding is not counted."""
    bytes: int
    """Bytes of layer files' tensors; copies are counted."""
    dtype: str
    layer_files: int
    padded_vocab_size: int


def export_deepspeed(
    checkpoint: Path | str,
    output: Path | str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> ExportedDeepSpeed:
    """Write the weights of a BLOOM as a step of Megatron-DeepSpeed's pipeline.

    Memory: a few times `row_ranges.CHUNK_BYTES`. The files of one layer are made up on the disk first, which takes
    their size of it once more while they are written.

    Args:    checkpoint: one, or a run directory (its newest). tensor_parallel_size: files of each layer.
             pipeline_parallel_size: with it, the number of settings files. dtype: type to write; None keeps each
             tensor's own. verify: compare every file that is read with its hash in the manifest first.
    Raises:  MissingError, CorruptCheckpointError: not there, not whole. CheckpointError: no BLOOM. NonFiniteError: NaN
             or Inf. ConfigError: `output` exists, or the sizes do not divide. On any error nothing is left there.
    """
    output, checkpoint = Path(output), find_checkpoint(checkpoint)
    manifest = open_manifest(checkpoint)
    if verify:
        verify_descriptions(checkpoint, manifest)
    architecture = architecture_from_mapping(manifest.architecture)
    if not isinstance(architecture, BloomArchitecture):
        raise CheckpointError(
            f"{checkpoint} holds a {architecture.family}; Megatron-DeepSpeed's layer files are a BLOOM's. "
            "Use --format hf."
        )
    rows = _vocabulary_rows(architecture, tensor_parallel_size, pipeline_parallel_size)
    with CheckpointReader(checkpoint) as reader, atomic_directory(output) as temporary:
        parameters = match_checkpoint(reader, manifest)
        types = {parameter.ours: dtype or reader.tensors[parameter.ours].dtype for parameter in parameters}
        stored = {dtype_name(kept) for kept in types.values()}
        step = temporary / f"global_step{manifest.step}"
        step.mkdir()
        slicing = _Slicing(architecture, tensor_parallel_size, rows)
        total = sum(slicing.bytes_of(parameter, types[parameter.ours]) for parameter in parameters)
        files = 0
        compared: set[str] = set()
        with Progress("export", total=round(total / 1e6), unit="MB") as progress:
            for layer, group in groupby(parameters, key=slicing.layer_of):
                members = list(group)
                held = {name for one in members for name in reader.files_of(one.ours, (0, one.padded_shape[0]))}
                if verify:
                    verify_hashes(checkpoint, manifest, names=sorted(held - compared))
                    compared |= held
                files += _write_layer(step, layer, members, reader, slicing, types, progress)
        write_settings(
            step,
            architecture,
            step=manifest.step,
            ranks=tensor_parallel_size,
            stages=pipeline_parallel_size,
            vocabulary_rows=rows,
            dtype=types["embedding.word_embeddings.weight"],
            prefix_lm=attends_prefix(checkpoint, manifest),
        )
        (temporary / "latest").write_text(step.name, encoding="utf-8")
        copy_side_files(checkpoint / "hf", temporary / "hf")
    return ExportedDeepSpeed(
        directory=output,
        checkpoint=checkpoint,
        step=manifest.step,
        tensors=len(parameters),
        parameters=sum(math.prod(parameter.shape) for parameter in parameters),
        bytes=total,
        dtype=stored.pop() if len(stored) == 1 else "mixed",
        layer_files=files,
        padded_vocab_size=rows,
    )


def _vocabulary_rows(architecture: BloomArchitecture, ranks: int, stages: int) -> int:
    """Return the rows of the embedding, of padding where the ranks cannot share the vocabulary without.

    Raises:  ConfigError: heads do not divide, or there are more stages than blocks.
    """
    if ranks < 1 or not 1 <= stages <= architecture.num_layers:
        raise ConfigError(
            f"tensor_parallel_size={ranks} must be at least 1, and pipeline_parallel_size={stages} from 1 to the "
            f"model's {architecture.num_layers} layers."
        )
    check_tensor_parallel(ranks, sizes={"attention heads": architecture.num_attention_heads})
    if architecture.vocab_size % ranks == 0:
        return architecture.vocab_size
    return -(-architecture.vocab_size // (VOCAB_DIVISOR * ranks)) * VOCAB_DIVISOR * ranks


@dataclass(frozen=True)
class _Slicing:
    """How parameters are cut for tensor-parallel ranks."""

    architecture: BloomArchitecture
    ranks: int
    vocabulary_rows: int

    def layer_of(self, parameter: MatchedParameter) -> int:
        """Return the number of a parameter's file."""
        return self.place_of(parameter)[0]

    def place_of(self, parameter: MatchedParameter) -> tuple[int, str]:
        """Return number of the file and name in it."""
        name = parameter.hf[0].removeprefix("transformer.")
        return layer_and_key(name, num_layers=self.architecture.num_layers)

    def shape_of(self, parameter: MatchedParameter) -> tuple[int, ...]:
        """Return the shape of a rank's slice."""
        shape = list(parameter.shape)
        if parameter.split == "vocabulary rows":
            shape[0] = self.vocabulary_rows // self.ranks
        elif parameter.split == "column rows":
            shape[0] //= self.ranks
        elif parameter.split == "row columns":
            shape[1] //= self.ranks
        return tuple(shape)

    def bytes_of(self, parameter: MatchedParameter, dtype: torch.dtype) -> int:
        """Return the bytes of all slices."""
        return self.ranks * math.prod(self.shape_of(parameter)) * dtype.itemsize

    def scatter(self, parameter: MatchedParameter, part: torch.Tensor, start: int, slices: list[torch.Tensor]) -> None:
        """Copy our rows [start, start + len(part)) into the slices of all ranks."""
        if parameter.split == "replicated":
            for target in slices:
                target[start : start + len(part)] = part
            return
        if parameter.split == "row columns":
            for target, columns in zip(slices, part.chunk(self.ranks, dim=1), strict=True):
                target[start : start + len(part)] = columns
            return
        size = len(slices[0])
        for rank, target in enumerate(slices):
            low, high = max(start, rank * size), min(start + len(part), (rank + 1) * size)
            if low < high:
                target[low - rank * size : high - rank * size] = part[low - start : high - start]


def _write_layer(
    directory: Path,
    layer: int,
    parameters: list[MatchedParameter],
    reader: CheckpointReader,
    slicing: _Slicing,
    types: dict[str, torch.dtype],
    progress: Progress,
) -> int:
    """Write the files of one layer; return how many.

    `torch.save` wants all tensors of a file at once: they are files themselves, mapped, so that they take no memory.
    """
    scratch = directory / "scratch"
    scratch.mkdir()
    states: list[OrderedDict[str, torch.Tensor]] = [OrderedDict() for _ in range(slicing.ranks)]
    for number, parameter in enumerate(parameters):
        _, key = slicing.place_of(parameter)
        shape, dtype = slicing.shape_of(parameter), types[parameter.ours]
        for rank, state in enumerate(states):
            name = str(scratch / f"{number}-{rank}")
            state[key] = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        slices = [state[key] for state in states]
        row_bytes = math.prod(parameter.shape[1:]) * dtype.itemsize
        for start, end in row_ranges(parameter.shape[0], row_bytes, chunk_bytes=CHUNK_BYTES):
            part = convert_part(reader.read(parameter.ours, rows=(start, end)), dtype=dtype, name=parameter.ours)
            slicing.scatter(parameter, part, start, slices)
        progress.advance(round(slicing.bytes_of(parameter, dtype) / 1e6))
    for rank, state in enumerate(states):
        torch.save(state, directory / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    states.clear()
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    return slicing.ranks
