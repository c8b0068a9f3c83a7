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
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.manifest import checkpoint_directory
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.streamed_write import CHUNK_BYTES, StreamedWriter, row_ranges
from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.deepspeed import given_config, write_side_files
from megatron_xmtf.conversion.huggingface import convert_part
from megatron_xmtf.conversion.huggingface_model import DTYPES, dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.conversion.megatron_core_settings import find_torch_dist, read_megatron_settings
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.bloom_architecture import BloomArchitecture, bloom_from_hf
from megatron_xmtf.progress import Progress

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
) -> ImportedMegatron:
    """Turn a torch_dist checkpoint of Megatron-LM or Megatron-Core that holds a BLOOM into a checkpoint of step 0.

    Memory: a chunk of `streamed_write.CHUNK_BYTES`, or the largest tensor of one layer as it is stored.

    Args:    directory: with `.metadata`, or the one above with latest_checkpointed_iteration.txt. config: a BLOOM's
             config.json or a directory with it; None: by the settings in common.pt. tokenizer: directory whose
             tokenizer files go along. vocab_size: rows of the embedding to keep; None: as `config` says, or all.
             dtype: type to store; None keeps the checkpoint's.
    Raises:  MissingError, CheckpointError, CorruptCheckpointError: not there, another model, not whole or not harmless.
             NonFiniteError: NaN or Inf. ConfigError: `output` exists. On any error nothing is left there.
    """
    output, found = Path(output), find_torch_dist(directory)
    values, iteration = (given_config(Path(config)), None) if config is not None else read_megatron_settings(found)
    with CheckpointReader(found) as reader:
        weights = [name for name in reader.tensors if not name.startswith(NO_WEIGHTS)]
        prefix = next((prefix for prefix in PREFIXES if prefix + EMBEDDING in weights), None)
        if prefix is None:
            raise CheckpointError(f"{found} holds no {EMBEDDING}; it is no decoder of Megatron-Core.")
        stored_rows = reader.tensors[prefix + EMBEDDING].shape[0]
        values["vocab_size"] = vocab_size or values.get("vocab_size", stored_rows)
        architecture = bloom_from_hf(values)
        parameters = expand_rows(bloom_mapping(architecture))
        places = _match(reader, weights, parameters, architecture, prefix=prefix)
        types = {parameter.ours: dtype or reader.tensors[places[parameter.ours].key].dtype for parameter in parameters}
        stored = {dtype_name(kept) for kept in types.values()}
        stored_name = stored.pop() if len(stored) == 1 else "mixed"
        total = sum(math.prod(parameter.shape) * types[parameter.ours].itemsize for parameter in parameters)
        with checkpoint_directory(
            output,
            step=0,
            architecture=architecture.to_mapping(),
            dtype=stored_name,
            config=None,
            consumed_rows=0,
            contents=["model"],
            origin={"format": "megatron-core torch_dist", "name": found.name, "iteration": iteration},
        ) as temporary:
            with (
                Progress("import", total=round(total / 1e6), unit="MB") as progress,
                StreamedWriter(temporary) as writer,
            ):
                for parameter in parameters:
                    place, kept = places[parameter.ours], types[parameter.ours]
                    _import_parameter(reader, place, parameter, writer, dtype=kept)
                    progress.advance(round(math.prod(parameter.shape) * kept.itemsize / 1e6))
                writer.finish()
            write_side_files(temporary / "hf", values, stored_name, config=config, tokenizer=tokenizer)
    count = sum(math.prod(parameter.shape) for parameter in parameters)
    dropped = max(0, stored_rows - architecture.vocab_size)
    return ImportedMegatron(output, found, len(parameters), count, total, stored_name, iteration, dropped)


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


def _import_parameter(
    reader: CheckpointReader,
    place: _Place,
    parameter: MatchedParameter,
    writer: StreamedWriter,
    *,
    dtype: torch.dtype,
) -> None:
    rows, padded = parameter.shape[0], parameter.padded_shape[0]
    rest = (0,) * (len(parameter.shape) - 1)
    row_bytes = math.prod(parameter.shape[1:]) * max(dtype.itemsize, reader.tensors[place.key].dtype.itemsize)
    # A stored chunk of stacked layers is one layer's: cut into rows it would be read once for every range of them.
    whole = None if place.layer is None else reader.read(place.key, rows=(place.layer, place.layer + 1))[0]
    for start, end in row_ranges(rows, row_bytes, chunk_bytes=CHUNK_BYTES):
        part = reader.read(place.key, rows=(start, end)) if whole is None else whole[start:end]
        part = convert_part(part, dtype=dtype, name=place.key)
        writer.write(parameter.ours, part, offsets=(start, *rest), shape=parameter.padded_shape)
    for start, end in row_ranges(padded - rows, row_bytes, chunk_bytes=CHUNK_BYTES):
        zeros = torch.zeros((end - start, *parameter.shape[1:]), dtype=dtype)
        writer.write(parameter.ours, zeros, offsets=(rows + start, *rest), shape=parameter.padded_shape)
