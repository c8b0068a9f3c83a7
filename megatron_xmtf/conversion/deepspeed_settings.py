"""Settings files beside Megatron-DeepSpeed's layer files: what its trainer looks for when it loads a step.

They hold no weights and no optimizer state. Two classes are named in them: argparse's Namespace, and Megatron's enum of
position embeddings, which a load compares with the run's own.
"""

from __future__ import annotations

import argparse
import enum
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.models.bloom_architecture import BloomArchitecture
from megatron_xmtf.models.split_sizes import VOCAB_DIVISOR

__all__ = ["write_settings"]

DEEPSPEED_VERSION = "0.7.1"
"""What BLOOM was trained with; DeepSpeed compares it with its own to know the form of the files."""


class PositionEmbeddingType(enum.Enum):
    """Megatron-DeepSpeed's enum, which a pickle names as megatron.enums.PositionEmbeddingType."""

    __module__ = "megatron.enums"
    rotary = 1
    absolute = 2
    alibi = 3


def write_settings(
    directory: Path,
    architecture: BloomArchitecture,
    *,
    step: int,
    ranks: int,
    stages: int,
    vocabulary_rows: int,
    dtype: torch.dtype,
    prefix_lm: bool,
) -> None:
    """Write mp_rank_MM_model_states.pt of all model-parallel ranks, the same in each.

    Args:  step: optimizer steps done. ranks, stages: tensor- and pipeline-parallel size. vocabulary_rows: of the
           embedding, padding counted. dtype: of the weights.
           prefix_lm: whether inputs are read in both directions.
    """
    with _their_module():
        arguments = _arguments(architecture, dtype=dtype)
        arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size = ranks, stages
        arguments.padded_vocab_size = vocabulary_rows
        arguments.prefixlm = prefix_lm
        value: dict[str, Any] = {
            "module": None,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": None,
            "lr_scheduler": None,
            "sparse_tensor_module_names": set(),
            "skipped_steps": 0,
            "global_steps": step,
            "global_samples": 0,
            "dp_world_size": 1,
            "mp_world_size": ranks * stages,
            "ds_config": {},
            "ds_version": DEEPSPEED_VERSION,
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": step,
            "tokens": 0,
            "checkpoint_info": {
                "padded_vocab_size": vocabulary_rows,
                "original_vocab_size": architecture.vocab_size,
            },
        }
        for model in range(ranks * stages):
            torch.save(value, directory / f"mp_rank_{model:02d}_model_states.pt")


def _arguments(architecture: BloomArchitecture, *, dtype: torch.dtype) -> argparse.Namespace:
    """Return Megatron's settings, as far as they say what the model is."""
    return argparse.Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.layernorm_epsilon,
        position_embedding_type=PositionEmbeddingType.alibi,
        embed_layernorm=True,
        apply_residual_connection_post_layernorm=False,
        glu_activation=None,
        bias_gelu_fusion=True,
        openai_gelu=False,
        hidden_dropout=architecture.hidden_dropout,
        attention_dropout=architecture.attention_dropout,
        make_vocab_size_divisible_by=VOCAB_DIVISOR,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        consumed_train_tokens=0,
    )


@contextmanager
def _their_module() -> Iterator[None]:
    """Put `PositionEmbeddingType` where its pickle says that it is, without Megatron-DeepSpeed.

    pickle looks a class up under its name before it writes that: a module of that name is there meanwhile.
    """
    name = PositionEmbeddingType.__module__
    module, before = types.ModuleType(name), sys.modules.get(name)
    vars(module)["PositionEmbeddingType"] = PositionEmbeddingType
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
