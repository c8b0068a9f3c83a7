"""AlexaTM's options equal `transformers` Blenderbot, which has them: pre-LN, learned positions, biases, scaled scores.

Two tables of embeddings, the head tied to the decoder's, over the pipeline as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

from megatron_xmtf.models.architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.forward import run_logits
from megatron_xmtf.parallel.launch import run_ranks
from tests.encoder_decoder import batches_of, pack
from tests.encoder_decoder_engine import Shard, assemble, run_config, start_engine
from tests.layouts import PP, TP
from tests.tiny import random_examples

EXAMPLES = random_examples(16, seed=3, longest=10)
ROWS = pack(EXAMPLES, start=1)[:4]
ARCHITECTURE = EncoderDecoderArchitecture(
    hidden_size=48,
    num_encoder_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    head_dim=12,
    ffn_hidden_size=56,
    vocab_size=300,
    layernorm_epsilon=1e-5,
    feed_forward="gelu",
    norm="layernorm",
    positions="learned",
    linear_bias=True,
    attention_scaling=True,
    max_positions=20,
    tied_embeddings=False,
    tied_head=True,
    decoder_start_token_id=1,
    family="alexatm",
)
TOLERANCE = 1e-4


@cache
def theirs() -> BlenderbotForConditionalGeneration:
    """Return a Blenderbot whose encoder has a table of its own, drawn so that logits spread over several units."""
    config = BlenderbotConfig(
        vocab_size=300,
        d_model=48,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        max_position_embeddings=20,
        activation_function="gelu_new",
        dropout=0.0,
        scale_embedding=False,
        pad_token_id=0,
    )
    model = BlenderbotForConditionalGeneration(config).eval()
    model.model.encoder.embed_tokens.weight = torch.nn.Parameter(torch.empty(300, 48))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "layer_norm.weight" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    return model


def by_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell Blenderbot's parameters as checkpoints do."""
    ours: dict[str, Tensor] = {}

    def per_head(prefix: str, names: str, kind: str) -> Tensor:
        parts = [state[f"{prefix}.{name}_proj.{kind}"] for name in names]
        return torch.stack([part.view(4, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 2)

    for side, count in (("encoder", 3), ("decoder", 2)):
        words = state[f"model.{side}.embed_tokens.weight"]
        ours[f"{side}.embedding.word_embeddings.weight"] = torch.cat([words, words.new_zeros(84, 48)])
        ours[f"{side}.embedding.position_embeddings.weight"] = state[f"model.{side}.embed_positions.weight"]
        for kind in ("weight", "bias"):
            ours[f"{side}.final_layernorm.{kind}"] = state[f"model.{side}.layer_norm.{kind}"]
            for number in range(count):
                inner, mine = f"model.{side}.layers.{number}", f"{side}.layers.{number}"
                names = {
                    "input_layernorm": "self_attn_layer_norm",
                    "self_attention.linear_proj": "self_attn.out_proj",
                    "pre_mlp_layernorm": "final_layer_norm",
                    "mlp.linear_fc1": "fc1",
                    "mlp.linear_fc2": "fc2",
                }
                ours[f"{mine}.self_attention.linear_qkv.{kind}"] = per_head(f"{inner}.self_attn", "qkv", kind)
                if side == "decoder":
                    names["pre_cross_attn_layernorm"] = "encoder_attn_layer_norm"
                    names["cross_attention.linear_q"] = "encoder_attn.q_proj"
                    names["cross_attention.linear_proj"] = "encoder_attn.out_proj"
                    ours[f"{mine}.cross_attention.linear_kv.{kind}"] = per_head(f"{inner}.encoder_attn", "kv", kind)
                for name, other in names.items():
                    ours[f"{mine}.{name}.{kind}"] = state[f"{inner}.{other}.{kind}"]
    return ours


@cache
def expected() -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Logits of each example alone, and the gradients of the mean over all target tokens."""
    model, logits = theirs(), {}
    for number in sorted(int(example) for row in ROWS for example in row.example_ids):
        inputs, targets = EXAMPLES[number]
        decoder = torch.tensor([[1, *targets[:-1]]])
        logits[number] = model(input_ids=torch.tensor([inputs]), decoder_input_ids=decoder).logits[0]
    losses = [
        torch.nn.functional.cross_entropy(found, torch.tensor(EXAMPLES[number][1]), reduction="sum")
        for number, found in logits.items()
    ]
    (sum(losses) / sum(len(EXAMPLES[number][1]) for number in logits)).backward()  # type: ignore[union-attr]
    # Under every name: the decoder's table has three.
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {number: found.detach() for number, found in logits.items()}, by_our_names(gradients)


def rank_result(
    sections: dict[str, Any], whole: dict[str, Tensor]
) -> tuple[list[np.ndarray], list[Shard], list[Shard]]:
    engine = start_engine(ARCHITECTURE, whole, run_config(**sections))
    batches = batches_of(ROWS)
    logits = run_logits(engine.chunks, batches, lambda batch, logits: logits.numpy())
    engine.forward_backward(batches)
    gradients = engine.gradients()
    for _ in range(3):
        engine.train_step(batches)
    return logits, gradients, engine.weights()


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2-SP-PP2": (
        4,
        {
            "parallel": {TP: 2, PP: 2, "sequence_parallel": True, "pipeline_layers": [2, 3]},
            "recompute": {"granularity": "full"},
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_equal_transformers(layout: str) -> None:
    logits, gradients = expected()
    assert torch.cat(list(logits.values())).std() > 1.0, "logits must spread for the comparison to mean something"
    world_size, sections = LAYOUTS[layout]
    whole = by_our_names({name: value.detach() for name, value in theirs().state_dict().items()})
    results = run_ranks(rank_result, world_size=world_size, arguments=(sections, whole))
    for found, *_ in results:
        for number, row in enumerate(ROWS):
            for segment, example in enumerate(row.example_ids, start=1):
                mine = found[number // 2][number % 2][row.decoder_segment_ids == segment]
                assert np.abs(mine - logits[int(example)].numpy()).max() <= TOLERANCE
    ours = assemble([parts for _, parts, _ in results])
    assert ours.keys() == gradients.keys()
    # A constant added to all keys of a query changes no attention: keys have no gradient but rounding.
    for name, wanted in gradients.items():
        scale = max(float(wanted.abs().max()), 1e-3)
        assert float((ours[name] - wanted).abs().max()) <= TOLERANCE * scale, name
    assemble([weights for *_, weights in results], tolerance=0.0)
