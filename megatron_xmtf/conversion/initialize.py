"""A preset -> checkpoint of step 0 with random weights, streamed a few rows at a time.

    weight                                    drawn from
    matrices, tables of words and positions   N(0, 0.02)             BERT, GPT-2, BART's `init_std`
    ...linear_proj, ...linear_fc2             N(0, 0.02 / sqrt(N))   GPT-2, section 2.3: N residual sums of the side,
                                                                     2 a layer of the encoder, 3 of the decoder
    biases; weights of norms                  0; 1                   all of them

A number follows from the seed, the name of its tensor and its place alone: every 4 Mi numbers of a tensor have a
generator of their own. So neither a layout nor how much is drawn at once changes a weight. Padded rows are zero, as
behind an import.

Source:  Devlin et al. 2018 (BERT, appendix A.2); Radford et al. 2019 (GPT-2); `transformers` 5.23 BartConfig.init_std,
         BlenderbotConfig.init_std. AlexaTM 20B itself begins with a trained encoder of 10B (Soltan et al. 2022, section
         3), which is not published; how the rest is drawn is not told.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from megatron_xmtf.checkpoint.manifest import checkpoint_directory
from megatron_xmtf.checkpoint.streamed_write import StreamedWriter, row_ranges
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface_model import copy_side_files
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.files import write_json
from megatron_xmtf.models.alexatm_config import alexatm_to_hf
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.progress import Progress

__all__ = ["INITIAL_STD", "initial_std", "initialize_checkpoint"]

INITIAL_STD = 0.02
BLOCK_NUMBERS = 4 << 20
"""Numbers of a tensor that one generator draws: 16 MiB. To change it changes every initial weight."""


def initialize_checkpoint(
    architecture: EncoderDecoderArchitecture, output: Path | str, *, tokenizer: Path | str, seed: int
) -> None:
    """Write a checkpoint of step 0 with random fp32 weights.

    Memory: one block of `BLOCK_NUMBERS`, whatever the size of the model.

    Args:    tokenizer: directory whose tokenizer files go along, as those of an import do.
    Raises:  CheckpointError: the architecture has no Hugging Face form. ConfigError: `output` exists. On any error
             nothing is left at `output`.
    """
    config = alexatm_to_hf(architecture)
    parameters = expand_rows(mapping_of(architecture))
    total = sum(torch.Size(parameter.padded_shape).numel() for parameter in parameters)
    with checkpoint_directory(
        output,
        step=0,
        architecture=architecture.to_mapping(),
        dtype="float32",
        config=None,
        consumed_rows=0,
        contents=["model"],
    ) as temporary:
        with (
            Progress("initialise", total=round(total / 1e6), unit="M numbers") as progress,
            StreamedWriter(temporary) as writer,
        ):
            written = 0
            for parameter in parameters:
                _write_tensor(parameter, writer, std=initial_std(parameter.ours, architecture), seed=seed)
                count = torch.Size(parameter.padded_shape).numel()
                progress.advance(round((written + count) / 1e6) - round(written / 1e6))
                written += count
            writer.finish()
        copy_side_files(Path(tokenizer), temporary / "hf")
        # What stands beside a tokenizer may be another model's.
        (temporary / "hf" / "generation_config.json").unlink(missing_ok=True)
        write_json(temporary / "hf" / "config.json", {**config, "dtype": "float32"})


def initial_std(name: str, architecture: EncoderDecoderArchitecture) -> float:
    """Return the standard deviation of a weight; 0 for biases and for weights of norms, which are constant."""
    if name.endswith(".bias") or "layernorm" in name:
        return 0.0
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        if name.startswith("encoder."):
            return float((2 * architecture.num_encoder_layers) ** -0.5) * INITIAL_STD
        return float((3 * architecture.num_decoder_layers) ** -0.5) * INITIAL_STD
    return INITIAL_STD


def _write_tensor(parameter: MatchedParameter, writer: StreamedWriter, *, std: float, seed: int) -> None:
    columns = parameter.shape[1:]
    row_numbers = max(1, torch.Size(columns).numel())
    rest = (0,) * len(columns)
    rows = parameter.shape[0]
    for first, last in row_ranges(parameter.padded_shape[0], row_numbers, chunk_bytes=BLOCK_NUMBERS):
        part = torch.full((last - first, *columns), 1.0 if "layernorm.weight" in parameter.ours else 0.0)
        if std:
            part.copy_(torch.from_numpy(_draw(part.shape, f"{seed} {parameter.ours} {first}")) * std)
        part[max(0, rows - first) :] = 0.0
        writer.write(parameter.ours, part, offsets=(first, *rest), shape=parameter.padded_shape)


def _draw(shape: tuple[int, ...], key: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Draw a block of standard normal numbers that belong to `key`."""
    digest = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32)
    return np.random.default_rng(digest.tolist()).standard_normal(shape, dtype=np.float32)
