"""Megatron-LM's `torch_dist` checkpoint of a BLOOM -> checkpoint of step 0.

Megatron-Core writes the layers of a block stacked, or each by its number; Transformer Engine's fused layers hold the
norm before them:

    ours                                            as stored by Megatron-LM
    decoder.layers.2.mlp.linear_fc1.bias  [f]       decoder.layers.mlp.linear_fc1.bias  [layers, f], row 2
    decoder.layers.2.input_layernorm.bias [h]       ...self_attention.linear_qkv.layer_norm_bias [layers, h], row 2
    decoder.layers.2.pre_mlp_layernorm.bias         ...mlp.linear_fc1.layer_norm_bias

A plain GPT of Megatron-LM is no BLOOM: it has learned, rotary or no positions and no LayerNorm behind the embedding. It
is refused with the settings that differ. Nothing but tensors is read, `.metadata` through its allow-list (`safe_read`),
`common.pt` through `torch_file`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.safe_read import METADATA_NAME
from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.checkpoint_parts import CheckpointDescription, write_checkpoint
from megatron_xmtf.conversion.deepspeed import check_side_sources, given_config, write_side_files
from megatron_xmtf.conversion.finite import convert_part
from megatron_xmtf.conversion.huggingface_model import dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.conversion.megatron_core_settings import find_torch_dist, read_megatron_settings
from megatron_xmtf.conversion.safetensors_file import DTYPES
from megatron_xmtf.conversion.tensor_source import TensorSource, common_dtype, matched_tensor
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.bloom_architecture import BloomArchitecture, bloom_from_hf

__all__ = ["ImportedMegatron", "import_megatron"]

PREFIXES = ("", "model.", "module.")
"""What stands before every weight's name, by the program that saved it."""
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
NO_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rng.", "rerun_state_machine_state")
"""Beginnings of what a checkpoint holds besides weights."""
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ImportedMegatron:
    """What an import did."""

    checkpoint: Path
    source: Path
    tensors: int
    parameters: int
    """Numbers in the model; padding is not counted."""
    bytes: int
    dtype: str
    iteration: int | None
    dropped_vocabulary_rows: int


@dataclass(frozen=True)
class _Place:
    """Where a parameter is stored."""

    key: str
    layer: int | None
    """Its place along the first axis of stacked layers; None: the tensor is its own."""


def import_megatron(
    directory: Path | str,
    output: Path | str,
    *,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    restart: bool = False,
) -> ImportedMegatron:
    """Turn a torch_dist checkpoint of Megatron-LM or Megatron-Core that holds a BLOOM into a checkpoint of step 0.

    Memory: a few times `row_ranges.CHUNK_BYTES` in each process.

    Args:    directory: with `.metadata`, or the one above with latest_checkpointed_iteration.txt. config: a BLOOM's
             config.json or a directory with it; None: by the settings in common.pt. tokenizer: directory whose
             tokenizer files go along. vocab_size: rows of the embedding to keep; None: as `config` says, or all.
             dtype: type to store; None keeps the checkpoint's. workers, restart: as in `write_checkpoint`.
    Raises:  MissingError, CheckpointError, CorruptCheckpointError: not there, another model, not whole or not harmless.
             NonFiniteError: NaN or Inf. ConfigError: `output` exists. On any error nothing is left there.
    """
    output, found = Path(output), find_torch_dist(directory)
    values, iteration = (given_config(Path(config)), None) if config is not None else read_megatron_settings(found)
    with CheckpointReader(found) as reader:
        rows = _stored_rows(reader)
    values["vocab_size"] = vocab_size or values.get("vocab_size", rows)
    architecture = bloom_from_hf(values)
    open_source = partial(MegatronSource, found, architecture, dtype)
    check_side_sources(config, tokenizer)
    with open_source() as source:
        parameters, stored = source.parameters, common_dtype(source.tensors)
        total = sum(math.prod(parameter.shape) * source.types[parameter.ours].itemsize for parameter in parameters)
        written = write_checkpoint(
            output,
            source,
            open_source,
            describe=CheckpointDescription(
                architecture.to_mapping(),
                origin={"format": "megatron-core torch_dist", "name": found.name, "iteration": iteration},
            ),
            add_files=lambda path: write_side_files(path / "hf", values, stored, config=config, tokenizer=tokenizer),
            settings={"dtype": str(dtype), "vocab_size": architecture.vocab_size},
            workers=workers,
            restart=restart,
        )
    count = sum(math.prod(parameter.shape) for parameter in parameters)
    dropped = max(0, rows - architecture.vocab_size)
    return ImportedMegatron(output, found, len(parameters), count, total, written.dtype, iteration, dropped)


class MegatronSource(TensorSource):
    """An opened torch_dist checkpoint of Megatron-Core as the tensors of ours.

    Args:    dtype: type to store; None keeps the checkpoint's.
    Raises:  CheckpointError: names what is missing, unexpected or misshaped.
    """

    def __init__(self, directory: Path, architecture: BloomArchitecture, dtype: torch.dtype | None) -> None:
        self._reader = CheckpointReader(directory, once=True)
        weights, prefix = _weights(self._reader)
        self.parameters = expand_rows(bloom_mapping(architecture))
        self._places = _match(self._reader, weights, self.parameters, architecture, prefix=prefix)
        stored = {ours: self._reader.tensors[place.key].dtype for ours, place in self._places.items()}
        self.types = {ours: dtype or kept for ours, kept in stored.items()}
        """Our name -> type to store."""
        self.tensors = [
            matched_tensor(parameter, self.types[parameter.ours], read_as=stored[parameter.ours])
            for parameter in self.parameters
        ]
        self._shapes = {parameter.ours: parameter.shape for parameter in self.parameters}

    @property
    def files(self) -> list[Path]:
        """The files of the checkpoint."""
        directory = self._reader.directory
        names = {place.relative_path for place in self._reader.metadata.storage_data.values()}
        return [directory / name for name in (METADATA_NAME, *sorted(names))]

    def close(self) -> None:
        """Close the checkpoint."""
        self._reader.close()

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return our rows [first, last) of a parameter; of stacked layers those of its layer.

        Raises:  NonFiniteError: NaN or Inf. CorruptCheckpointError: a chunk cannot be read.
        """
        place, shape, (first, last) = self._places[name], self._shapes[name], rows
        if first >= shape[0]:
            return torch.zeros((last - first, *shape[1:]), dtype=self.types[name])
        if place.layer is None:
            part = self._reader.read(place.key, rows=rows)
        else:
            stacked = torch.empty((1, last - first, *shape[1:]), dtype=self._reader.tensors[place.key].dtype)
            self._reader.read_into(place.key, stacked, offsets=(place.layer, first, *(0 for _ in shape[1:])))
            part = stacked[0]
        return convert_part(part, dtype=self.types[name], name=f"{place.key} in {self._reader.directory}")


def _weights(reader: CheckpointReader) -> tuple[list[str], str]:
    """Return the names of the weights, and what stands before each.

    Raises:  CheckpointError: there is no embedding.
    """
    weights = [name for name in reader.tensors if not name.startswith(NO_WEIGHTS)]
    prefix = next((prefix for prefix in PREFIXES if prefix + EMBEDDING in weights), None)
    if prefix is None:
        raise CheckpointError(f"{reader.directory} holds no {EMBEDDING}; it is no decoder of Megatron-Core.")
    return weights, prefix


def _stored_rows(reader: CheckpointReader) -> int:
    """Return the rows of the embedding, those of padding counted."""
    return reader.tensors[_weights(reader)[1] + EMBEDDING].shape[0]


def _match(
    reader: CheckpointReader,
    weights: list[str],
    parameters: list[MatchedParameter],
    architecture: BloomArchitecture,
    *,
    prefix: str,
) -> dict[str, _Place]:
    """Match every weight of both sides once, by name, shape and type.

    Raises:  CheckpointError: names what is missing, unexpected or misshaped.
    """
    found = set(weights)
    places: dict[str, _Place] = {}
    missing, problems = [], []
    for parameter in parameters:
        place = next((place for place in _candidates(parameter.ours, prefix) if place.key in found), None)
        if place is None:
            missing.append(parameter.ours)
            continue
        places[parameter.ours] = place
        tensor, shape = reader.tensors[place.key], parameter.shape
        is_table = parameter.ours == EMBEDDING
        if is_table and tensor.shape[0] < shape[0]:
            raise ConfigError(f"{reader.directory}: {place.key} has {tensor.shape[0]} rows, vocab_size is {shape[0]}.")
        wanted = (tensor.shape[0], *shape[1:]) if is_table else shape
        if place.layer is not None:
            wanted = (architecture.num_layers, *shape)
        if tensor.shape != wanted:
            problems.append(f"{place.key} is {list(tensor.shape)} instead of {list(wanted)}")
        if tensor.dtype not in DTYPES.values():
            problems.append(f"{place.key} has type {dtype_name(tensor.dtype)}")
    unexpected = sorted(found - {place.key for place in places.values()})
    if missing or unexpected:
        raise CheckpointError(
            f"{reader.directory} does not hold the tensors of a bloom with {architecture.num_layers} layers: "
            f"missing ({len(missing)}): {', '.join(missing[:8]) or 'none'}; "
            f"unexpected ({len(unexpected)}): {', '.join(unexpected[:8]) or 'none'}. A GPT with learned positions, "
            "an output layer of its own or no LayerNorm behind its embedding is no BLOOM."
        )
    if problems:
        listed = "; ".join(dict.fromkeys(problems))
        raise CheckpointError(f"{reader.directory}: {listed}. Do its settings belong to it?")
    return places


def _candidates(ours: str, prefix: str) -> list[_Place]:
    """Return the places where a parameter of ours may be, the plainest first."""
    if not ours.startswith("decoder.layers."):
        return [_Place(prefix + ours, None)]
    _, _, number, rest = ours.split(".", 3)
    spellings = [rest]
    spellings += [rest.replace(plain, fused) for plain, fused in FUSED_NORMS.items() if rest.startswith(plain)]
    return [
        place
        for name in spellings
        for place in (
            _Place(f"{prefix}decoder.layers.{number}.{name}", None),
            _Place(f"{prefix}decoder.layers.{name}", int(number)),
        )
    ]
