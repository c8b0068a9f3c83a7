"""Which torch_dist checkpoint of Megatron-LM a path means, and whether its settings are a BLOOM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xmtf.checkpoint.safe_read import COMMON_NAME, METADATA_NAME
from megatron_xmtf.conversion.deepspeed_layout import bloom_config
from megatron_xmtf.conversion.torch_file import fields_of, open_torch_file
from megatron_xmtf.errors import CheckpointError, MissingError
from megatron_xmtf.files import require_directory

__all__ = ["find_torch_dist", "read_megatron_settings"]

TRACKER = "latest_checkpointed_iteration.txt"
WANTED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("alibi",),
    "normalization": ("LayerNorm",),
    "add_bias_linear": (True,),
    "swiglu": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "untie_embeddings_and_output_weights": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_layernorm": (False,),
    "group_query_attention": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (None,),
}
"""Megatron-LM's settings that make a model another one -> a BLOOM's values."""


def find_torch_dist(directory: Path | str) -> Path:
    """Find the checkpoint that a path means: with `.metadata`, or the newest of the directory above.

    Raises:  MissingError: not there, or of another format. CheckpointError: the tracker is no tracker.
    """
    directory = require_directory(directory)
    if (directory / METADATA_NAME).is_file():
        return directory
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise MissingError(
            f"{directory} holds neither {METADATA_NAME} nor {TRACKER}: it is no torch_dist checkpoint. Megatron-LM "
            "saves one with --ckpt-format torch_dist; its older format (mp_rank_00/model_optim_rng.pt) is not read."
        )
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and not word.isdigit():
        raise CheckpointError(f"{tracker} says {word[:40]!r} instead of a number of iterations or `release`.")
    found = require_directory(directory / ("release" if word == "release" else f"iter_{int(word):07d}"))
    if not (found / METADATA_NAME).is_file():
        raise MissingError(f"{found}, which {tracker} names, holds no {METADATA_NAME}: no torch_dist checkpoint.")
    return found


def read_megatron_settings(directory: Path) -> tuple[dict[str, Any], int | None]:
    """Read a BLOOM's config.json out of the settings in common.pt, and the iteration.

    Raises:  CheckpointError: no settings, or they are another model's; names each that differs.
    """
    path = directory / COMMON_NAME
    value = open_torch_file(path)
    found = fields_of(value.get("args")) if isinstance(value, dict) else {}
    hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or not isinstance(found.get("num_layers"), int):
        raise CheckpointError(
            f"{path} has no `args` with hidden_size, num_layers and num_attention_heads, and tensors do not show "
            "heads. Give a BLOOM's config.json with --config."
        )
    wanted = {**WANTED, "ffn_hidden_size": (4 * hidden,), "kv_channels": (hidden // max(1, heads),)}
    problems = [
        f"{name} is {found[name]!r}, not {right[0]!r}"
        for name, right in wanted.items()
        if name in found and found[name] not in right
    ]
    if "position_embedding_type" not in found:
        problems.append("position_embedding_type is not said")
    if not (found.get("bias_gelu_fusion", True) or found.get("openai_gelu", False)):
        # Megatron-Core's fused bias and GELU is the tanh form, its plain one is exact.
        problems.append("neither bias_gelu_fusion nor openai_gelu is set, so GELU is the exact one, not its tanh form")
    if problems:
        raise CheckpointError(
            f"{path}: this model is no BLOOM: {'; '.join(problems)}. Of decoders only BLOOM is offered; a GPT of "
            "Megatron-LM would compute something else."
        )
    iteration = value.get("iteration")
    return bloom_config(found), iteration if isinstance(iteration, int) else None
