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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_xmtf.checkpoint.row_ranges import row_ranges
from megatron_xmtf.conversion.checkpoint_parts import CheckpointDescription, write_checkpoint
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface_model import check_side_files, copy_side_files
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.conversion.tensor_source import SourceTensor, TensorSource
from megatron_xmtf.files import write_json
from megatron_xmtf.models.alexatm_config import alexatm_to_hf
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["INITIAL_STD", "initial_std", "initialize_checkpoint"]

INITIAL_STD = 0.02
BLOCK_NUMBERS = 4 << 20
"""Numbers of a tensor that one generator draws: 16 MiB. To change it changes every initial weight."""


def initialize_checkpoint(
    architecture: EncoderDecoderArchitecture, output: Path | str, *, tokenizer: Path | str, seed: int
) -> None:
    """Write a checkpoint of step 0 with random fp32 weights.

    Memory: a block of `BLOCK_NUMBERS` in each process, whatever the size of the model.

    Args:    tokenizer: directory whose tokenizer files go along, as those of an import do.
    Raises:  CheckpointError: the architecture has no Hugging Face form. ConfigError: `output` exists. On any error
             nothing is left at `output`.
    """
    config = alexatm_to_hf(architecture)
    check_side_files(Path(tokenizer))

    def add_files(directory: Path) -> None:
        copy_side_files(Path(tokenizer), directory / "hf")
        # What stands beside a tokenizer may be another model's.
        (directory / "hf" / "generation_config.json").unlink(missing_ok=True)
        write_json(directory / "hf" / "config.json", {**config, "dtype": "float32"})

    open_source = partial(InitialSource, architecture, seed)
    with open_source() as source:
        write_checkpoint(
            output,
            source,
            open_source,
            describe=CheckpointDescription(architecture.to_mapping()),
            add_files=add_files,
            settings={"architecture": architecture.to_mapping(), "seed": seed},
            what="initialise",
        )


class InitialSource(TensorSource):
    """Random weights as the tensors of a checkpoint."""

    def __init__(self, architecture: EncoderDecoderArchitecture, seed: int) -> None:
        self._architecture, self._seed = architecture, seed
        self._parameters = {parameter.ours: parameter for parameter in expand_rows(mapping_of(architecture))}
        self.tensors = [
            SourceTensor(name, parameter.padded_shape, torch.float32, tuple(_blocks(parameter)))
            for name, parameter in self._parameters.items()
        ]

    @property
    def files(self) -> list[Path]:
        """None: all follows from the architecture and the seed."""
        return []

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return a block of a tensor, padded rows zero."""
        parameter, (first, last) = self._parameters[name], rows
        std = initial_std(name, self._architecture)
        part = torch.full((last - first, *parameter.shape[1:]), 1.0 if "layernorm.weight" in name else 0.0)
        if std:
            part.copy_(torch.from_numpy(_draw(part.shape, f"{self._seed} {name} {first}")) * std)
        part[max(0, parameter.shape[0] - first) :] = 0.0
        return part


def initial_std(name: str, architecture: EncoderDecoderArchitecture) -> float:
    """Return the standard deviation of a weight; 0 for biases and for weights of norms, which are constant."""
    if name.endswith(".bias") or "layernorm" in name:
        return 0.0
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        if name.startswith("encoder."):
            return float((2 * architecture.num_encoder_layers) ** -0.5) * INITIAL_STD
        return float((3 * architecture.num_decoder_layers) ** -0.5) * INITIAL_STD
    return INITIAL_STD


def _blocks(parameter: MatchedParameter) -> Iterator[tuple[int, int]]:
    """Cut a tensor into the rows that a generator draws each."""
    row_numbers = max(1, torch.Size(parameter.shape[1:]).numel())
    return row_ranges(parameter.padded_shape[0], row_numbers, chunk_bytes=BLOCK_NUMBERS)


def _draw(shape: tuple[int, ...], key: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Draw a block of standard normal numbers that belong to `key`."""
    digest = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32)
    return np.random.default_rng(digest.tolist()).standard_normal(shape, dtype=np.float32)
