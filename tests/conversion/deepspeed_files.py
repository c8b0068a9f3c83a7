"""Checkpoints as Megatron-DeepSpeed's pipeline and BF16_Optimizer write them, cut from a model of `transformers`.

Written from the description of the files, with nothing of the importer. Classes of the two programs exist while a file
is written and are gone when it is read.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import tiny_bloom

Tensors = dict[str, torch.Tensor]
LAYERS, HIDDEN, HEADS = 12, 48, 12
ROW_PARALLEL = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
COLUMN_PARALLEL = ("query_key_value", "dense_h_to_4h", "word_embeddings.weight")
DECAYED = ("dense", "query_key_value.weight", "word_embeddings.weight")


class PositionEmbeddingType(enum.Enum):
    rotary = 1
    absolute = 2
    alibi = 3


@dataclass
class fragment_address:  # noqa: N801  (DeepSpeed's own name, which the pickles hold)
    numel: int
    start: int


class Unknown:
    """A class of no allow-list."""


FOREIGN = {
    PositionEmbeddingType: "megatron.enums",
    fragment_address: "deepspeed.runtime.bf16_optimizer",
    Unknown: "deepspeed.somewhere.new",
}


@contextmanager
def foreign_modules() -> Iterator[None]:
    """Let pickle find the classes under the names that the real programs give them."""
    made = []
    for kind, name in FOREIGN.items():
        parts = name.split(".")
        for parent in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                made.append(parent)
        setattr(sys.modules[name], kind.__name__, kind)
        kind.__module__ = name
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with foreign_modules():
        torch.save(value, path)


def hf_tensors(*, seed: int = 0, vocab_size: int = 300, layers: int = LAYERS) -> Tensors:
    """Return fp32 weights of a BLOOM by their Hugging Face names, without prefix and tied head."""
    model = tiny_bloom(seed=seed, vocab_size=vocab_size, hidden_size=HIDDEN, layers=layers, heads=HEADS)
    state = model.state_dict()
    return {name.removeprefix("transformer."): value for name, value in state.items() if name != "lm_head.weight"}


def their_names(tensors: Tensors) -> dict[str, tuple[int, str]]:
    """Map Hugging Face names to number of the file and name in it."""
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    found = {
        "word_embeddings.weight": (1, "word_embeddings.weight"),
        "word_embeddings_layernorm.weight": (1, "word_embeddings.norm.weight"),
        "word_embeddings_layernorm.bias": (1, "word_embeddings.norm.bias"),
        "ln_f.weight": (layers + 4, "weight"),
        "ln_f.bias": (layers + 4, "bias"),
    }
    for name in tensors:
        if name.startswith("h."):
            _, block, key = name.split(".", 2)
            found[name] = (int(block) + 3, key)
    return found


def cut(name: str, tensor: torch.Tensor, tp: int) -> list[torch.Tensor]:
    """Cut a weight into the parts of the tensor-parallel ranks."""
    if any(text in name for text in ROW_PARALLEL):
        return [part.clone() for part in tensor.chunk(tp, dim=1)]
    if any(text in name for text in COLUMN_PARALLEL):
        return [part.clone() for part in tensor.chunk(tp, dim=0)]
    return [tensor.clone() for _ in range(tp)]


def module_name(layer: int, key: str) -> str:
    return f"tied_modules.embed.{key}" if layer == 1 else f"{layer}.{key}"


def slices(tensors: Tensors, tp: int) -> list[dict[tuple[int, str], torch.Tensor]]:
    """Return what each tensor-parallel rank holds, by number of the file and name in it."""
    names = their_names(tensors)
    cuts = {names[name]: cut(name, tensor, tp) for name, tensor in tensors.items()}
    return [{place: parts[rank] for place, parts in cuts.items()} for rank in range(tp)]


def settings(tensors: Tensors, *, tp: int, pp: int, **changes: Any) -> argparse.Namespace:
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_layers": layers,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": 4 * HIDDEN,
        "kv_channels": HIDDEN // HEADS,
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": PositionEmbeddingType.alibi,
        "embed_layernorm": True,
        "apply_residual_connection_post_layernorm": False,
        "glu_activation": None,
        "bias_gelu_fusion": True,
        "openai_gelu": False,
        "params_dtype": torch.bfloat16,
        "hidden_dropout": 0.1,
        "seq_length": 64,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }
    return argparse.Namespace(**{**values, **changes})


def write_layers(directory: Path, tensors: Tensors, *, tp: int, dtype: torch.dtype = torch.bfloat16) -> None:
    for rank, held in enumerate(slices(tensors, tp)):
        for layer in sorted({layer for layer, _ in held}):
            state = OrderedDict((key, value.to(dtype)) for (number, key), value in held.items() if number == layer)
            save(state, directory / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")


def write_settings(directory: Path, tensors: Tensors, *, tp: int, pp: int, **changes: Any) -> None:
    for model in range(tp * pp):
        value = {
            "module": None,
            "args": settings(tensors, tp=tp, pp=pp, **changes),
            "checkpoint_version": 3.0,
            "iteration": 95000,
            "checkpoint_info": {"padded_vocab_size": 300, "original_vocab_size": 290},
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "ds_version": "0.7.1",
        }
        save(value, directory / f"mp_rank_{model:02d}_model_states.pt")


def stage_of(layer: int, *, pp: int, layers: int = LAYERS) -> int:
    """Return the pipeline stage of a layer: blocks evenly, the embedding first, the last LayerNorm last."""
    if layer == 1:
        return 0
    return min((layer - 3) * pp // layers, pp - 1)


def flat_partitions(tensors: Tensors, *, tp: int, pp: int, dp: int) -> Iterator[tuple[int, int, int, Any, Any]]:
    """Cut every stage's parameters into flat partitions as BF16_Optimizer does.

    Yields:  stage, tp rank, dp rank, partitions of both groups (with decay, without), their `param_slice_mappings`.
    """
    for stage in range(pp):
        for rank, held in enumerate(slices(tensors, tp)):
            mine = {place: value for place, value in held.items() if stage_of(place[0], pp=pp) == stage}
            if stage == pp - 1 and pp > 1:  # the tied copy of the embedding, not in step with the first stage's
                mine[1, "word_embeddings.weight"] = held[1, "word_embeddings.weight"] + 7.0
            groups = [
                {place: v for place, v in mine.items() if ("weight" in place[1] and v.dim() > 1) == decayed}
                for decayed in (True, False)
            ]
            partitions: list[list[torch.Tensor]] = [[] for _ in range(dp)]
            mappings: list[list[OrderedDict[str, fragment_address]]] = [[] for _ in range(dp)]
            for group in groups:
                flat = torch.cat([value.reshape(-1) for value in group.values()] or [torch.zeros(0)])
                flat = torch.cat([flat, torch.full((-len(flat) % (2 * dp),), 99.0)])
                size = len(flat) // dp
                for share in range(dp):
                    partitions[share].append(flat[share * size : (share + 1) * size].clone())
                    found, begin = OrderedDict(), 0
                    for (layer, key), value in group.items():
                        low, high = max(begin, share * size), min(begin + value.numel(), (share + 1) * size)
                        if low < high:
                            found[module_name(layer, key)] = fragment_address(
                                numel=high - low, start=low - share * size
                            )
                        begin += value.numel()
                    mappings[share].append(found)
            for share in range(dp):
                yield stage, rank, share, partitions[share], mappings[share]


def write_optimizer(directory: Path, tensors: Tensors, *, tp: int, pp: int, dp: int, prefix: str = "bf16_") -> None:
    for stage, rank, share, groups, mappings in flat_partitions(tensors, tp=tp, pp=pp, dp=dp):
        moments = {n: {"step": 3, "exp_avg": g * 0.5, "exp_avg_sq": g * g} for n, g in enumerate(groups)}
        state = {
            "clip_grad": 1.0,
            "base_optimizer_state": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "single_partition_of_fp32_groups": [group.requires_grad_() for group in groups],
            "group_paddings": [0, 0],
            "partition_count": [dp, dp],
            "ds_version": "0.7.1",
            "param_slice_mappings": mappings,
        }
        name = f"{prefix}zero_pp_rank_{share}_mp_rank_{stage * tp + rank:02d}_optim_states.pt"
        save({"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.7.1"}, directory / name)


def write_universal(directory: Path, tensors: Tensors) -> None:
    for name, (layer, key) in their_names(tensors).items():
        folder = directory / "zero" / module_name(layer, key)
        value: dict[str, Any] = {"param": tensors[name]}
        if any(text in name for text in (*ROW_PARALLEL, *COLUMN_PARALLEL)):
            value["cat_dim"] = 1 if any(text in name for text in ROW_PARALLEL) else 0
        if name == "word_embeddings.weight":
            value["vocab_divisibility_padding_tensor"] = tensors[name][-1]
        save(value, folder / "fp32.pt")
        for moment in ("exp_avg", "exp_avg_sq"):
            save({**value, "param": tensors[name] * 0.5}, folder / f"{moment}.pt")


def write_fragments(directory: Path, tensors: Tensors, *, tp: int, pp: int, dp: int) -> None:
    """Write tmp/<parameter>/<tp>/<state>.<dp>, as the first half of ds_to_universal.py does: views, not copies."""
    for stage, rank, share, groups, mappings in flat_partitions(tensors, tp=tp, pp=pp, dp=dp):
        for flat, mapping in zip(groups, mappings, strict=True):
            for name, address in mapping.items():
                if "word_embeddings.weight" in name and stage > 0:
                    continue
                folder = directory / "tmp" / name / str(rank)
                for state, scale in (("fp32", 1.0), ("exp_avg", 0.5)):
                    view = (flat * scale).narrow(0, address.start, address.numel)
                    save(view, folder / f"{state}.{share:0>2d}")
