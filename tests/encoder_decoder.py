"""What tests of encoder-decoders share: weights of `transformers` by our names, rows of both sides, oracles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch, build_encoder_decoder_batch
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

Example = tuple[list[int], list[int]]
ENCODER_LENGTH, DECODER_LENGTH = 24, 16


def by_our_names(state: dict[str, Tensor], architecture: EncoderDecoderArchitecture) -> dict[str, Tensor]:
    """Spell the parameters of a T5 in `transformers` as checkpoints do; written by hand, apart from `conversion`."""
    heads, rows = architecture.num_attention_heads, architecture.padded_vocab_size

    def per_head(prefix: str, names: str) -> Tensor:
        """Interleave projections head by head: [heads, parts, head_dim] rows."""
        parts = [state[f"{prefix}.{name}.weight"] for name in names]
        return torch.stack([part.view(heads, -1, part.size(1)) for part in parts], dim=1).flatten(0, 2)

    def padded(weight: Tensor) -> Tensor:
        return torch.cat([weight, weight.new_zeros(rows - len(weight), weight.size(1))])

    ours = {"embedding.word_embeddings.weight": padded(state["shared.weight"])}
    if not architecture.tied_head:
        ours["output_layer.weight"] = padded(state["lm_head.weight"])
    for side in ("encoder", "decoder"):
        ours[f"{side}.final_layernorm.weight"] = state[f"{side}.final_layer_norm.weight"]
        ours[f"{side}.relative_attention_bias.weight"] = state[
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
        count = architecture.num_encoder_layers if side == "encoder" else architecture.num_decoder_layers
        for number in range(count):
            theirs, mine = f"{side}.block.{number}.layer", f"{side}.layers.{number}"
            ours[f"{mine}.input_layernorm.weight"] = state[f"{theirs}.0.layer_norm.weight"]
            ours[f"{mine}.self_attention.linear_qkv.weight"] = per_head(f"{theirs}.0.SelfAttention", "qkv")
            ours[f"{mine}.self_attention.linear_proj.weight"] = state[f"{theirs}.0.SelfAttention.o.weight"]
            last = 1
            if side == "decoder":
                last = 2
                ours[f"{mine}.pre_cross_attn_layernorm.weight"] = state[f"{theirs}.1.layer_norm.weight"]
                ours[f"{mine}.cross_attention.linear_q.weight"] = state[f"{theirs}.1.EncDecAttention.q.weight"]
                ours[f"{mine}.cross_attention.linear_kv.weight"] = per_head(f"{theirs}.1.EncDecAttention", "kv")
                ours[f"{mine}.cross_attention.linear_proj.weight"] = state[f"{theirs}.1.EncDecAttention.o.weight"]
            inner = f"{theirs}.{last}.DenseReluDense"
            names = ["wi_0", "wi_1"] if architecture.gated else ["wi"]
            ours[f"{mine}.pre_mlp_layernorm.weight"] = state[f"{theirs}.{last}.layer_norm.weight"]
            ours[f"{mine}.mlp.linear_fc1.weight"] = torch.cat([state[f"{inner}.{name}.weight"] for name in names])
            ours[f"{mine}.mlp.linear_fc2.weight"] = state[f"{inner}.wo.weight"]
    return ours


def shards(chunks: Sequence[Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor, Tensor]]:
    """Return (name, global shape, offset, part, parameter) of what this rank holds; `part` is a view of `parameter`."""
    found = []
    for chunk in chunks:
        state = unwrap_model(chunk).sharded_state_dict(metadata={"non_homogeneous_layers": True})
        for value in state.values():
            if isinstance(value, ShardedTensorFactory):
                parts = value.build()
            elif isinstance(value, ShardedTensor):
                parts = [value]
            else:
                continue
            for part in parts:
                found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), part.data, value.data))
    return found


def set_weights(chunks: Sequence[Any], whole: dict[str, Tensor]) -> None:
    """Copy this rank's part of every whole tensor into its chunks."""
    for name, shape, offset, part, _ in shards(chunks):
        assert tuple(whole[name].shape) == shape, (name, whole[name].shape, shape)
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        with torch.no_grad():
            part.copy_(whole[name][place])


def pack(examples: Sequence[Example], *, per_row: int = 3, start: int = 0) -> list[EncoderDecoderRow]:
    """Put examples in order into rows of both sides, at most `per_row` in each, as many as fit."""
    groups: list[list[int]] = [[]]
    for number, (inputs, targets) in enumerate(examples):
        held = groups[-1]
        encoder = sum(len(examples[other][0]) for other in held) + len(inputs)
        decoder = sum(len(examples[other][1]) for other in held) + len(targets)
        if len(held) == per_row or encoder > ENCODER_LENGTH or decoder > DECODER_LENGTH:
            groups.append([])
        groups[-1].append(number)
    return [row_of({number: examples[number] for number in group}, start=start) for group in groups]


def row_of(examples: dict[int, Example], *, start: int = 0) -> EncoderDecoderRow:
    """Put examples side by side; none at all is a row of padding."""
    sides = [np.zeros((2, ENCODER_LENGTH), np.int32), np.zeros((2, DECODER_LENGTH), np.int32)]
    for side, (tokens, segments) in enumerate(sides):
        place = 0
        for segment, example in enumerate(examples.values(), start=1):
            ids = example[side]
            tokens[place : place + len(ids)], segments[place : place + len(ids)] = ids, segment
            place += len(ids)
    return EncoderDecoderRow(
        encoder_tokens=sides[0][0],
        encoder_segment_ids=sides[0][1],
        targets=sides[1][0],
        decoder_segment_ids=sides[1][1],
        decoder_start_id=start,
        dataset_ids=np.zeros(len(examples), np.uint16),
        example_ids=np.array(list(examples), np.int64),
    )


def batches_of(rows: Sequence[EncoderDecoderRow], *, normalization: Any = "target_token") -> list[EncoderDecoderBatch]:
    """Cut rows into micro-batches of two."""
    return [build_encoder_decoder_batch(rows[i : i + 2], normalization=normalization) for i in range(0, len(rows), 2)]
