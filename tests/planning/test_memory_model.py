"""Activations and logits against published formulas and figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_xmtf.config.parallel import ParallelConfig, RecomputeConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.planning.cluster import PRESETS
from megatron_xmtf.planning.engine import ENGINES
from megatron_xmtf.planning.layer_work import layer_work, work_key
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import GIB, head_bytes, memory_by_stage
from megatron_xmtf.planning.run_model import PUBLISHED

GPT3 = BloomArchitecture(hidden_size=12288, num_layers=96, num_attention_heads=96, vocab_size=51200)
S, B, H, A = 2048, 1, 12288, 96
SBH = S * B * H


def layout(tp: int = 1, *, sequence_parallel: bool = False, granularity: str = "none", **changed: object) -> Layout:
    base = Layout(
        gpus=64,
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel),
        lengths=S,
        micro_batch_size=B,
        global_batch_size=64,
        recompute=RecomputeConfig(granularity=granularity),
        attention="unfused",
        dropout=True,
    )
    return replace(base, **changed)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (layout(), SBH * (34 + 5 * A * S / H)),
        (layout(8), SBH * (10 + 24 / 8 + 5 * A * S / (H * 8))),
        (layout(8, sequence_parallel=True), SBH / 8 * (34 + 5 * A * S / H)),
    ],
)
def test_a_layer_keeps_what_is_published(chosen: Layout, wanted: float) -> None:
    """Korthikanti et al. 2022, table 2; without scores 34 sbh / t, as with selective recomputation."""
    work = layer_work(GPT3, "causal", work_key(chosen))
    assert work.kept_bytes == pytest.approx(wanted)
    assert work.kept_bytes - work.kept_score_bytes == pytest.approx(wanted - 5 * A * S * SBH / H / chosen.tp)
    split = 8 if chosen.parallel.sequence_parallel else 1
    assert work.input_bytes == pytest.approx(2 * SBH / split)
    # One kernel for bias, dropout and residual draws dropout again: two masks of a byte less.
    fused = layer_work(GPT3, "causal", work_key(replace(chosen, residual="fused")))
    assert work.kept_bytes - fused.kept_bytes == pytest.approx(2 * SBH / split)
    plain = replace(chosen, dropout=False)
    assert layer_work(GPT3, "causal", work_key(plain)).kept_bytes == pytest.approx(
        layer_work(GPT3, "causal", work_key(replace(plain, residual="fused"))).kept_bytes
    )


def test_gpt3s_scores_are_80_and_530bs_64() -> None:
    """The paper's own numbers of 5 a s / h, beside 34: 80 for GPT-3, 64 for MT-NLG 530B (section 5)."""
    mtnlg = BloomArchitecture(hidden_size=20480, num_layers=105, num_attention_heads=128, vocab_size=51200)
    for architecture, wanted in ((GPT3, 80), (mtnlg, 64)):
        work = layer_work(architecture, "causal", work_key(layout()))
        assert work.kept_score_bytes / (S * B * architecture.hidden_size) == pytest.approx(wanted)


def test_interleaving_holds_more_by_the_published_factor() -> None:
    """1 + (p - 1) / (p v) of all layers of a rank's share, L / p x p of them (section 4.2.3)."""
    plain = layout(8, gpus=128).__class__(
        **{
            **layout(8).__dict__,
            "gpus": 64,
            "parallel": ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=8),
        }
    )
    interleaved = replace(
        plain,
        parallel=ParallelConfig(
            tensor_model_parallel_size=8, pipeline_model_parallel_size=8, virtual_pipeline_model_parallel_size=3
        ),
    )
    # Stage 1 has no embedding, and holds 7 of 8; its share of the factor's 2 (p - i - 1) + (v - 1) p + 1 chunks.
    first, second = (memory_by_stage(GPT3, one, PRESETS["a100-80"])[0].activations for one in (plain, interleaved))
    assert second / first == pytest.approx(1 + 7 / 24, rel=0.01)


def test_logits_of_250_thousand_words() -> None:
    """BLOOM at TP4, two rows: 4,096 x 62,720 logits, of 10 bytes in published engines, of 2 in ours, 2^28 at most.

    Ours with the gradients that are made from them: of the weight, 62,720 x 14,336, and of the input.
    """
    bloom = PUBLISHED["bloomz-176b"]
    chosen = layout(4, micro_batch_size=2)
    of_weight, wide = 62_720 * 14_336 * 2, 2**24 * 4
    assert head_bytes(bloom, replace(chosen, engine=ENGINES["deepspeed_bf16"])) == 4096 * 62_720 * 10
    assert head_bytes(bloom, chosen, plain=True) == 4096 * 62_720 * 10 + of_weight + 4096 * 14_336 * 2
    assert head_bytes(bloom, chosen) == 4096 * 62_720 * 2 + of_weight + 4096 * 14_336 * 2
    quarter = replace(chosen, loss_fraction=0.25)
    assert head_bytes(bloom, quarter) == 1024 * 62_720 * 2 + of_weight + 1024 * 14_336 * 2
    # Plain torch: pieces of 2^24 logits in fp32, two beside the gradients.
    assert head_bytes(bloom, replace(chosen, head="chunked")) == head_bytes(bloom, chosen) + 2 * wide
    # Beyond 2^28 logits: the input's gradient in fp32, and the part of one chunk.
    many = replace(chosen, micro_batch_size=16)
    assert head_bytes(bloom, many) == 2**28 * 2 + of_weight + 32_768 * 14_336 * (4 + 2)
    in_fp32 = head_bytes(bloom, replace(many, precision="fp32", head="chunked"))
    assert in_fp32 == 2**28 * 4 + 2 * of_weight + 32_768 * 14_336 * 4


def test_the_gradient_of_the_words_is_alive_behind_the_layers() -> None:
    """BLOOM-7b1 on one rank, full recomputation: 2 x 250,880 x 4,096 bytes, more than a layer of one row keeps."""
    bloom = PUBLISHED["bloomz-7b1"]
    chosen = layout(granularity="full", attention="fused", dropout=False)
    (stage,) = memory_by_stage(bloom, chosen, PRESETS["h200"])
    inputs, border = 30 * 2048 * 4096 * 2, 3 * 2048 * 4096 * 2
    assert stage.activations == inputs + border + 250_880 * 4096 * 2
    # Sixteen rows keep 32 b s h, twice as much as the table's gradient.
    (stage,) = memory_by_stage(bloom, replace(chosen, micro_batch_size=16, global_batch_size=1024), PRESETS["h200"])
    assert stage.activations == 16 * (inputs + border + 32 * 2048 * 4096)


def test_recomputation_orders_memory() -> None:
    """And a dense bias makes full recomputation dear: 4 bytes x 112 heads x 2,048^2 for each micro-batch in flight."""
    bloom = PUBLISHED["bloomz-176b"]
    counted = dict.fromkeys(("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"), True)
    base = layout(parallel=ParallelConfig(pipeline_model_parallel_size=72, **counted), gpus=288, global_batch_size=2048)

    def activations(granularity: str, attention: str) -> float:
        chosen = replace(base, recompute=RecomputeConfig(granularity=granularity), attention=attention)
        return memory_by_stage(bloom, chosen, PRESETS["h200"])[1].activations

    sizes = [activations(granularity, "unfused") for granularity in ("none", "selective", "full")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 * sizes[2]
    # Stage 1 holds 71 micro-batches; 7 bytes a score of one layer are live, those of "unfused" 5.
    extra = activations("full", "reference") - activations("full", "unfused")
    assert extra == pytest.approx(71 * 4 * 112 * 2048**2 + (7 - 5) * 112 * 2048**2)


def test_an_encoder_decoders_stage_keeps_both_sides() -> None:
    """A stage of encoder layers holds [enc; dec] of each micro-batch in flight, though it transforms one of them."""
    model = PUBLISHED["mt0-large"]
    short, long = EncoderDecoderLengths(1024, 128), EncoderDecoderLengths(1024, 1024)
    found = []
    for lengths in (short, long):
        chosen = layout(
            lengths=lengths,
            parallel=ParallelConfig(pipeline_model_parallel_size=4, pipeline_layers=[12, 12, 12, 12]),
            attention="fused",
            recompute=RecomputeConfig(granularity="full"),
        )
        stage = memory_by_stage(model, chosen, PRESETS["h100"])[1]
        assert (stage.layers, stage.in_flight) == (12, 3)
        found.append(stage.activations)
    # Three micro-batches x 896 more tokens x 1,024 wide x 2 bytes.
    assert found[1] - found[0] == 3 * 896 * 1024 * 2
    # Adam's bytes of a whole mT5-large: 18 a parameter, its words padded to 250,112 = 1,954 x 128.
    whole = memory_by_stage(model, layout(lengths=long), PRESETS["h100"])[0]
    assert (whole.weights + whole.gradients + whole.optimizer) / GIB == pytest.approx(18 * 1_229_581_312 / GIB)
