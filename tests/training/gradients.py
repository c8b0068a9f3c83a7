"""Collect the gradients of a trainer's ranks into whole tensors, under the names that checkpoints use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model

from megatron_xmtf.data.batch import Batch
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun
from megatron_xmtf.training.trainer import Trainer

Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def rank_gradients(prepared: PreparedRun, deal: Callable[[int, int], list[Batch]]) -> list[Shard]:
    """Run forward and backward once in one rank and return its gradient shards.

    Args:    deal: (data-parallel rank, size) -> the micro-batches of that rank.
    Returns: (name, global shape, offset, gradient) of each parameter of this rank.
    """
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    trainer.forward_backward(deal(topology.dp_rank, topology.dp_size))
    shards: list[Shard] = []
    for chunk in trainer.chunks:
        state = unwrap_model(chunk).sharded_state_dict(metadata={"non_homogeneous_layers": True})
        for value in state.values():
            if isinstance(value, ShardedTensor):
                gradient = value.data.main_grad.clone()
                shards.append((value.key, tuple(value.global_shape), tuple(value.global_offset), gradient))
    return shards


def assemble(results: list[list[Shard]]) -> dict[str, torch.Tensor]:
    """Put the shards of all ranks together; copies of one shard must agree."""
    whole: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    for shards in results:
        for name, shape, offset, gradient in shards:
            tensor = whole.setdefault(name, torch.zeros(shape))
            mask = written.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))
            if mask[place].any():
                assert torch.allclose(tensor[place], gradient, rtol=1e-4, atol=1e-6), f"copies of {name} differ"
            tensor[place], mask[place] = gradient, True
    assert all(bool(mask.all()) for mask in written.values())
    return whole


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return max|difference| / max|reference|, the measure of DESIGN 8."""
    return float((ours - reference).abs().max() / reference.abs().max())


def hf_name(name: str) -> str:
    """Spell one of our parameter names as BloomForCausalLM does; written by hand, apart from conversion.mapping."""
    for ours, theirs in [
        ("embedding.word_embeddings.", "transformer.word_embeddings."),
        ("embedding.layernorm.", "transformer.word_embeddings_layernorm."),
        ("decoder.final_layernorm.", "transformer.ln_f."),
        ("decoder.layers.", "transformer.h."),
        ("self_attention.linear_qkv.", "self_attention.query_key_value."),
        ("self_attention.linear_proj.", "self_attention.dense."),
        ("pre_mlp_layernorm.", "post_attention_layernorm."),
        ("mlp.linear_fc1.", "mlp.dense_h_to_4h."),
        ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
    ]:
        name = name.replace(ours, theirs)
    return name
