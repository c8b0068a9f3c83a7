"""What the plan says is held for the backward pass, against what autograd and torch's allocator hold of what runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_xmtf.config.parallel import KernelsConfig, ParallelConfig, RecomputeConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.kernels.head_loss import chunked
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.planning import memory_model
from megatron_xmtf.planning.layer_work import LayerWork, layer_work, work_key
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import head_bytes
from megatron_xmtf.planning.model_shape import ChunkShape, LayerKind

ROWS, LENGTH, ENCODER, DECODER = 2, 96, 96, 64


def kept_by_autograd(architecture: Architecture, parallel: ParallelConfig, granularity: str) -> int:
    """Run a forward pass in this rank, and return the bytes of what the backward pass would read, weights aside."""
    (model,) = build_model(
        architecture,
        parallel=parallel,
        recompute=RecomputeConfig(granularity=granularity),
        kernels=KernelsConfig(attention="reference"),
        encoder_length=ENCODER,
        decoder_length=DECODER,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def ones(length: int) -> torch.Tensor:
        return torch.ones(ROWS, length, dtype=torch.int64)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if isinstance(architecture, BloomArchitecture):
            loss = model(ones(LENGTH), ones(LENGTH), ones(LENGTH))
        else:
            loss = model(ones(ENCODER), ones(ENCODER), ones(DECODER), ones(DECODER), ones(DECODER))
        loss.sum()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights)


def rank_kept(architectures: list[Architecture], parallel: ParallelConfig, granularity: str) -> list[int]:
    initialize_parallel(parallel, seed=1)
    return [kept_by_autograd(architecture, parallel, granularity) for architecture in architectures]


def bloom(layers: int) -> BloomArchitecture:
    return BloomArchitecture(hidden_size=64, num_layers=layers, num_attention_heads=4, vocab_size=256)


def mt5(encoder: int, decoder: int) -> EncoderDecoderArchitecture:
    return EncoderDecoderArchitecture(
        hidden_size=64,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        num_attention_heads=4,
        head_dim=24,
        ffn_hidden_size=160,
        vocab_size=256,
    )


def planned(architecture: Architecture, kind: LayerKind, parallel: ParallelConfig) -> LayerWork:
    layout = Layout(
        gpus=2,
        parallel=parallel,
        lengths=LENGTH if kind == "causal" else EncoderDecoderLengths(ENCODER, DECODER),
        micro_batch_size=ROWS,
        global_batch_size=4,
        precision="fp32",
        attention="reference",
    )
    return layer_work(architecture, kind, work_key(layout))


@pytest.mark.parametrize(
    ("section", "granularity"),
    [
        ({}, "none"),
        ({}, "full"),
        ({"tensor_model_parallel_size": 2}, "none"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "none"),
    ],
)
def test_a_bloom_layer(section: dict[str, Any], granularity: str) -> None:
    """Two layers more, twice what one keeps; what the engine keeps beside (means, seeds) is a few per cent here."""
    parallel = ParallelConfig(**section)
    ranks = parallel.tensor_model_parallel_size
    measured = run_ranks(rank_kept, world_size=ranks, arguments=([bloom(2), bloom(4)], parallel, granularity))
    work = planned(bloom(2), "causal", parallel)
    wanted = work.kept_bytes if granularity == "none" else work.input_bytes
    assert (measured[0][1] - measured[0][0]) / 2 == pytest.approx(wanted, rel=0.03)


def test_layers_of_an_encoder_decoder() -> None:
    """Under selective recomputation, so without scores, as with the fused kernel.

    A CPU keeps more: its RMS norm is made of several operations, each of two keeps what it normalised (10 % here), and
    its GELU a copy of the gate's half of the first layer's output (12 %).
    """
    models: list[Architecture] = [mt5(2, 1), mt5(4, 1), mt5(2, 3)]
    (measured,) = run_ranks(rank_kept, world_size=1, arguments=(models, ParallelConfig(), "selective"))
    for kind, larger in (("encoder", measured[1]), ("decoder", measured[2])):
        work = planned(models[0], kind, ParallelConfig())
        wanted = work.kept_bytes - work.kept_score_bytes
        assert wanted <= (larger - measured[0]) / 2 <= 1.3 * wanted, kind


def largest_allocated(run: Callable[[], None]) -> int:
    """Return the most bytes that torch's CPU allocator held at once for what a function made."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    recorded = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(recorded, key=lambda event: event.start_ns()))
    return max(held)


@pytest.mark.parametrize("limit", [1 << 24, 1 << 18], ids=["at once", "in pieces"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("is_embedding", [False, True], ids=["a weight of its own", "the embedding's"])
def test_the_heads_worst_moment(
    precision: str, limit: int, is_embedding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 positions, 2,048 words, h = 128, forward and backward; beside it a dozen numbers a position."""
    assert chunked.LOGITS_AT_ONCE["cuda"] == memory_model.LOGITS_AT_ONCE
    assert chunked.WIDE_AT_ONCE == memory_model.WIDE_AT_ONCE
    assert chunked.GRADIENT_AT_ONCE == memory_model.GRADIENT_AT_ONCE
    for module in (memory_model, chunked):
        monkeypatch.setattr(module, "WIDE_AT_ONCE", 1 << 16)
        monkeypatch.setattr(module, "GRADIENT_AT_ONCE", 1 << 15)
    monkeypatch.setattr(memory_model, "LOGITS_AT_ONCE", limit)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    hidden, weight = (torch.randn(count, 128, dtype=dtype, requires_grad=True) for count in (512, 2048))
    shard = chunked.VocabularyShard(first=0, count=2048, is_embedding=is_embedding)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]

    def run() -> None:
        labels = torch.arange(512)
        chunked.head_loss(hidden, weight, labels, shard=shard, logits_at_once=limit).sum().backward()

    held = largest_allocated(run)
    architecture = BloomArchitecture(hidden_size=128, num_layers=1, num_attention_heads=4, vocab_size=2048)
    layout = Layout(
        gpus=1,
        parallel=ParallelConfig(),
        lengths=512,
        micro_batch_size=1,
        global_batch_size=1,
        precision=precision,
        head="chunked",
    )
    chunk = ChunkShape(layers=(), embeds=is_embedding, answers=True)
    assert 0 <= held - head_bytes(architecture, layout, chunk=chunk) < 12 * 4 * 512
    # Negative control: a number a logit is more than that.
    assert 12 * 4 * 512 < min(512 * 2048, limit)
