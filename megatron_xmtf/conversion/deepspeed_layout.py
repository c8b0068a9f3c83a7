"""What BigScience's Megatron-DeepSpeed wrote where: directories, files, names of parameters, settings of the run.

    PIPE/latest                                     names the step's directory: global_step95000
    PIPE/global_step95000/
      layer_01-model_TT-model_states.pt             embedding and its LayerNorm, tensor-parallel rank TT
      layer_03-... to layer_72-...                  one block each: file XX is block XX - 3
      layer_74-...                                  last LayerNorm (72 + 2; modules 0, 2 and 73 have no weights)
      mp_rank_MM_model_states.pt                    settings; MM = stage x tensor-parallel size + TT
      bf16_zero_pp_rank_D_mp_rank_MM_optim_states.pt  fp32 weights and moments, flat, a share a data-parallel rank
    PIPE/latest_universal -> a directory with zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt

A parameter's name is that of DeepSpeed's pipeline module; a layer file has it without the first part:

    file                                name                                         Hugging Face
    layer_01  word_embeddings.weight    tied_modules.embed.word_embeddings.weight    word_embeddings.weight
    layer_03  self_attention.dense.bias 3.self_attention.dense.bias                  h.0.self_attention.dense.bias
    layer_74  weight                    74.weight                                    ln_f.weight

Source:  GPTModelPipe of bigscience-workshop/Megatron-DeepSpeed 8387ae17; PipelineModule and BF16_Optimizer of
         DeepSpeed 0.7.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xmtf.conversion.torch_file import StandIn, fields_of, open_torch_file
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingError
from megatron_xmtf.files import require_directory, require_file, safe_child

__all__ = [
    "DeepSpeedDirectory",
    "DeepSpeedSettings",
    "bloom_config",
    "final_layer",
    "find_deepspeed",
    "layer_and_key",
    "parameter_name",
    "read_settings",
    "settings_to_hf",
]

EMBEDDING_LAYER = 1
FIRST_BLOCK = 3
TIED = "tied_modules.embed"
SETTINGS_FILE = "mp_rank_00_model_states.pt"
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
ALIBI = (3, "alibi")
"""The member of megatron.enums.PositionEmbeddingType, by value or name."""

Kind = Literal["layers", "universal", "fragments"]


@dataclass(frozen=True)
class DeepSpeedDirectory:
    """The directory of one step."""

    path: Path
    kind: Kind
    """layers: layer files. universal: zero/<parameter>/fp32.pt. fragments: tmp/<parameter>/<tp>/fp32.<dp>, which
    ds_to_universal.py makes first, and cannot merge where there are ten data-parallel ranks or more."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What mp_rank_00_model_states.pt says of the run; empty where there is no such file."""

    arguments: dict[str, Any]
    """Megatron's settings by name."""
    iteration: int | None
    checkpoint_version: float | None


def final_layer(num_layers: int) -> int:
    """Return the number of the last LayerNorm's file: behind the blocks and the module that undoes their layout."""
    return FIRST_BLOCK + num_layers + 1


def layer_and_key(hf_name: str, *, num_layers: int) -> tuple[int, str]:
    """Return file number and name in the file of a parameter.

    >>> layer_and_key("h.2.mlp.dense_h_to_4h.bias", num_layers=4), layer_and_key("ln_f.bias", num_layers=4)
    ((5, 'mlp.dense_h_to_4h.bias'), (8, 'bias'))
    """
    first, _, rest = hf_name.partition(".")
    if first == "h":
        block, _, key = rest.partition(".")
        return FIRST_BLOCK + int(block), key
    if first == "ln_f":
        return final_layer(num_layers), rest
    return EMBEDDING_LAYER, hf_name.replace("word_embeddings_layernorm", "word_embeddings.norm")


def parameter_name(layer: int, key: str) -> str:
    """Return the name of a parameter in the pipeline module."""
    return f"{TIED}.{key}" if layer == EMBEDDING_LAYER else f"{layer}.{key}"


def find_deepspeed(directory: Path | str) -> DeepSpeedDirectory:
    """Find the step that a path means: a step's own directory, or the one that `latest` beside it names.

    Raises:  MissingError: no such directory, or nothing of DeepSpeed's in it. ConfigError: `latest` leads elsewhere, or
             `latest` and `latest_universal` name two checkpoints.
    """
    directory = require_directory(directory)
    kind = _kind(directory)
    if kind is not None:
        return DeepSpeedDirectory(directory, kind)
    trackers = [name for name in ("latest", "latest_universal") if (directory / name).is_file()]
    if not trackers:
        raise MissingError(
            f"{directory} holds neither layer_01-model_00-model_states.pt nor zero/ nor a file `latest`: it is no "
            "checkpoint of Megatron-DeepSpeed's pipeline. Give the directory of a step (global_step95000)."
        )
    tags = {name: (directory / name).read_text(encoding="utf-8", errors="replace").strip() for name in trackers}
    if len(set(tags.values())) > 1:
        raise ConfigError(f"{directory} has two checkpoints, {tags}; give the directory of the one that is meant.")
    path = require_directory(safe_child(directory, next(iter(tags.values()))))
    kind = _kind(path)
    if kind is None:
        raise MissingError(f"{path}, which {directory / trackers[0]} names, holds neither layer files nor zero/.")
    return DeepSpeedDirectory(path, kind)


def _kind(directory: Path) -> Kind | None:
    if any(LAYER_FILE.fullmatch(path.name) for path in directory.iterdir()):
        return "layers"
    for kind, child in (("universal", "zero"), ("fragments", "tmp")):
        if (directory / child).is_dir():
            return kind  # type: ignore[return-value]
    return None


def read_settings(directory: Path) -> DeepSpeedSettings:
    """Read the settings of the run that wrote a checkpoint.

    Raises:  CorruptCheckpointError: the file is damaged, or names objects of a program that is not known.
    """
    if not (directory / SETTINGS_FILE).is_file():
        return DeepSpeedSettings({}, None, None)
    path = require_file(directory / SETTINGS_FILE)
    value = open_torch_file(path)
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(value).__name__} instead of a dictionary of settings.")
    iteration, version = value.get("iteration"), value.get("checkpoint_version")
    return DeepSpeedSettings(
        arguments=fields_of(value.get("args")),
        iteration=iteration if isinstance(iteration, int) else None,
        checkpoint_version=float(version) if isinstance(version, int | float) else None,
    )


def settings_to_hf(settings: DeepSpeedSettings, *, what: Path) -> dict[str, Any]:
    """Word a run's settings as the config.json of a BLOOM, but for its vocab_size.

    Raises:  CheckpointError: no settings, or they are not a BLOOM's; names each that differs.
    """
    found = settings.arguments
    sizes = {name: found.get(name) for name in ("hidden_size", "num_layers", "num_attention_heads")}
    if not all(isinstance(size, int) for size in sizes.values()):
        raise CheckpointError(
            f"{what} does not say what the model is: {SETTINGS_FILE} is missing or has no `args` with "
            f"{', '.join(sizes)}, and tensors do not show their heads. Give a BLOOM's config.json with --config."
        )
    problems = _differences(settings)
    if problems:
        raise CheckpointError(
            f"{what / SETTINGS_FILE}: {'; '.join(problems)}. A BLOOM computes something else, so the weights would be "
            "read wrongly. If the file is wrong, give the model's config.json with --config."
        )
    return bloom_config(found)


def bloom_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Word Megatron's settings as a BLOOM's config.json, without vocab_size.

    Dropout is the next run's setting, not the model's: 0 here, as in the published models.
    """
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": settings["hidden_size"],
        "n_layer": settings["num_layers"],
        "n_head": settings["num_attention_heads"],
        "layer_norm_epsilon": settings.get("layernorm_epsilon", 1e-5),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": False,
        "seq_length": settings.get("seq_length", 2048),
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        # The t0loading branch's --prefixlm: inputs were read in both directions.
        **({"prefix_lm": True} if settings.get("prefixlm") else {}),
    }


def _differences(settings: DeepSpeedSettings) -> list[str]:
    """Name the settings that are not a BLOOM's; what a file does not say counts as Megatron-DeepSpeed's way."""
    found = settings.arguments
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    position: Any = found.get("position_embedding_type")
    if isinstance(position, StandIn):
        position = position.arguments[0] if position.arguments else None
    wanted: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        "position_embedding_type": (position, ALIBI),
        "embed_layernorm": (found.get("embed_layernorm", True), (True,)),
        "ffn_hidden_size": (found.get("ffn_hidden_size", 4 * hidden), (4 * hidden,)),
        "kv_channels": (found.get("kv_channels", hidden // heads), (hidden // heads,)),
        "glu_activation": (found.get("glu_activation"), (None, "")),
        "apply_residual_connection_post_layernorm": (
            found.get("apply_residual_connection_post_layernorm", False),
            (False,),
        ),
        # The fused bias and GELU is the tanh form; without it torch's exact one runs, unless openai_gelu asks for tanh.
        "bias_gelu_fusion or openai_gelu": (
            bool(found.get("bias_gelu_fusion", True) or found.get("openai_gelu", False)),
            (True,),
        ),
        # Rows of the fused QKV were ordered otherwise in versions 0 and 1.
        "checkpoint_version of at least 2": ((settings.checkpoint_version or 3.0) >= 2.0, (True,)),
    }
    return [f"{name} is {value!r}, not {right[0]!r}" for name, (value, right) in wanted.items() if value not in right]
