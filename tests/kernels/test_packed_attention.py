"""Packed ALiBi attention against `transformers` segment by segment and a loop in float64; which one is chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.packed_attention import PackedAttention, choose_packed_attention, reference
from megatron_xmtf.kernels.packed_attention.choose import IMPLEMENTATIONS
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes, packed_bias
from megatron_xmtf.kernels.segment_attention import available
from tests.kernels.packed_rows import (
    HEAD_DIM,
    HEADS,
    PREFIX_MASK,
    PREFIXES,
    REAL,
    SEGMENT_IDS,
    attend,
    random_qkv,
    worst,
)


def attend_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_ids: Tensor,
    slopes: Tensor,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Oracle: one query at a time, over the keys of its segment that it sees; float64 [s, b, n * d]."""
    query, key, value = query.double(), key.double(), value.double()
    sequence, batch, heads, head_dim = query.shape
    contexts = []
    for q in range(sequence):
        for b in range(batch):
            own = [k for k in range(sequence) if segment_ids[b, k] == segment_ids[b, q]]
            keys = [k for k in own if k <= q or (prefix_mask is not None and prefix_mask[b, k])]
            for n in range(heads):
                # The published rule, slope * position of the key; ours has the distance.
                scores = torch.stack(
                    [query[q, b, n] @ key[k, b, n] / math.sqrt(head_dim) + slopes[n].double() * k for k in keys]
                )
                contexts.append(torch.softmax(scores, dim=0) @ value[keys, b, n])
    return torch.stack(contexts).view(sequence, batch, heads * head_dim)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 12, 16, 112])
def test_slopes_equal_those_of_transformers(heads: int) -> None:
    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope * position, so slope at position 1
    # transformers raises a rounded fp32 base to the power, we take powers in float64: a few roundings apart.
    torch.testing.assert_close(alibi_slopes(heads), alibi[:, 0, 1], rtol=1e-6, atol=0.0)
    assert alibi_slopes(heads).dtype == torch.float32


def test_slopes_of_a_power_of_two_and_between() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    # BLOOM-176B has 112 heads: 64 of them of a power of two, then every second slope of 128 heads.
    slopes = alibi_slopes(112)
    assert slopes[:64].tolist() == [float(torch.tensor(2.0 ** (-i / 8))) for i in range(1, 65)]
    assert slopes[64:].tolist() == [float(torch.tensor(2.0 ** (-i / 16))) for i in range(1, 97, 2)]


def test_the_worked_example_of_the_bias() -> None:
    bias = packed_bias(torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.tensor([0.5]))
    infinite = float("-inf")
    assert bias.shape == (1, 1, 6, 6) and bias.dtype == torch.float32
    assert bias[0, 0, 4].tolist() == [infinite, infinite, infinite, -0.5, 0.0, infinite]
    assert bias[0, 0, 2].tolist() == [-1.0, -0.5, 0.0, infinite, infinite, infinite]
    assert bias[0, 0, 5].tolist() == [infinite] * 5 + [0.0]


def test_the_worked_example_of_a_prefix() -> None:
    prefix_mask = torch.tensor([[1, 1, 1, 0, 1, 0, 0]]).bool()
    bias = packed_bias(torch.tensor([[1, 1, 1, 1, 2, 2, 0]]), torch.tensor([0.5]), prefix_mask)
    infinite = float("-inf")
    assert bias[0, 0, 0].tolist() == [0.0, 0.5, 1.0, infinite, infinite, infinite, infinite]
    assert bias[0, 0, 3].tolist() == [-1.5, -1.0, -0.5, 0.0, infinite, infinite, infinite]
    assert bias[0, 0, 4].tolist() == [infinite] * 4 + [0.0, infinite, infinite]
    assert bias[0, 0, 5].tolist() == [infinite] * 4 + [-0.5, 0.0, infinite]


def test_the_bias_is_exact_far_from_the_query() -> None:
    # bf16 holds integers up to 256 only: 299 would become 300.
    bias = packed_bias(torch.ones(1, 300, dtype=torch.int64), torch.tensor([0.25]))
    assert bias[0, 0, 299].tolist() == [-0.25 * (299 - key) for key in range(300)]


@PREFIXES
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_each_segment_equals_transformers_alone(name: str, prefix_mask: Tensor | None) -> None:
    torch.manual_seed(0)
    hidden_size = HEADS * HEAD_DIM
    theirs = BloomAttention(BloomConfig(hidden_size=hidden_size, n_head=HEADS, n_layer=1), layer_idx=0).eval()
    with torch.no_grad():
        theirs.query_key_value.weight.normal_(std=0.5)
        theirs.dense.weight.copy_(torch.eye(hidden_size))
        theirs.dense.bias.zero_()
    batch, sequence = SEGMENT_IDS.shape
    hidden = torch.randn(batch, sequence, hidden_size)
    with torch.no_grad():
        fused = theirs.query_key_value(hidden).view(batch, sequence, HEADS, 3, HEAD_DIM).transpose(0, 1)
        query, key, value = fused.unbind(dim=3)  # [s, b, n, d]
        ours = attend(name, query, key, value, SEGMENT_IDS, alibi_slopes(HEADS), prefix_mask)
        for b in range(batch):
            for segment in range(1, int(SEGMENT_IDS[b].max()) + 1):
                places = (SEGMENT_IDS[b] == segment).nonzero().flatten()
                length = len(places)
                alone = hidden[b, places][None]
                mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
                if prefix_mask is not None:
                    mask[:, prefix_mask[b, places]] = 0.0
                alibi = build_alibi_tensor(torch.ones(1, length), HEADS, torch.float32)
                expected, _ = theirs(alone, torch.zeros_like(alone), alibi, mask[None, None])
                assert worst(ours[places, b], expected[0]) < 1e-5


@PREFIXES
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_a_loop_in_float64(name: str, prefix_mask: Tensor | None) -> None:
    query, key, value = random_qkv(torch.float64)
    slopes = alibi_slopes(HEADS)
    expected = attend_by_hand(query, key, value, SEGMENT_IDS, slopes, prefix_mask)
    found = attend(name, query, key, value, SEGMENT_IDS, slopes.double(), prefix_mask)
    assert found.dtype == torch.float64
    if name == "segments":
        assert torch.count_nonzero(found[~REAL]) == 0
        found, expected = found[REAL], expected[REAL]
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("flipped ALiBi", lambda segment_ids, slopes: packed_bias(segment_ids, -slopes)),
        ("leaked segment", lambda segment_ids, slopes: packed_bias(torch.ones_like(segment_ids), slopes)),
        ("heads in another order", lambda segment_ids, slopes: packed_bias(segment_ids, slopes.flip(0))),
    ],
)
def test_a_deliberate_fault_is_seen(fault: str, broken: Callable[[Tensor, Tensor], Tensor]) -> None:
    query, key, value = random_qkv(torch.float64)
    slopes = alibi_slopes(HEADS)
    expected = attend_by_hand(query, key, value, SEGMENT_IDS, slopes)
    found = reference.packed_attention(query, key, value, broken(SEGMENT_IDS, slopes.double()))
    assert worst(found, expected) > 0.01, fault


@pytest.mark.parametrize(
    ("fault", "wrong_mask"),
    [
        ("causal inputs", None),
        ("a target seen before its turn", torch.cat([PREFIX_MASK[:, :1], PREFIX_MASK[:, :-1]], dim=1)),
        ("targets read in both directions", SEGMENT_IDS > 0),
    ],
)
def test_a_deliberate_fault_of_the_prefix_is_seen(fault: str, wrong_mask: Tensor | None) -> None:
    query, key, value = random_qkv(torch.float64)
    slopes = alibi_slopes(HEADS)
    expected = attend_by_hand(query, key, value, SEGMENT_IDS, slopes, PREFIX_MASK)
    found = attend("reference", query, key, value, SEGMENT_IDS, slopes.double(), wrong_mask)
    assert worst(found[REAL], expected[REAL]) > 0.01, fault


def test_distances_made_positive_are_another_bias() -> None:
    """ALiBi in both directions is often taken by absolute distance; the reference's rule is not that."""
    bias = packed_bias(SEGMENT_IDS, alibi_slopes(HEADS), PREFIX_MASK)
    query, key, value = random_qkv(torch.float64)
    expected = attend_by_hand(query, key, value, SEGMENT_IDS, alibi_slopes(HEADS), PREFIX_MASK)
    symmetric = torch.where(torch.isfinite(bias), -bias.abs(), bias)
    found = reference.packed_attention(query, key, value, symmetric)
    assert worst(found[REAL], expected[REAL]) > 0.01


@pytest.mark.parametrize("prefix", [None, [1, 0, 1, 1, 0]], ids=["causal", "prefix-LM"])
def test_gradients_of_the_reference_are_those_of_finite_differences(prefix: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, 1, 2, 3, generator=generator, dtype=torch.float64).unbind()
    mask = None if prefix is None else torch.tensor([prefix]).bool()
    bias = packed_bias(torch.tensor([[1, 1, 2, 2, 0]]), alibi_slopes(2).double(), mask)
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.packed_attention(q, k, v, bias), [tensor.requires_grad_() for tensor in inputs]
    )


@PREFIXES
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_segment_neither_sees_nor_moves_another(name: str, prefix_mask: Tensor | None) -> None:
    slopes = alibi_slopes(HEADS)
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(torch.float32))
    own = SEGMENT_IDS[0] == 3
    context = attend(name, query, key, value, SEGMENT_IDS, slopes, prefix_mask)
    gradients = torch.autograd.grad(context[own, 0].sum(), (query, key, value))
    for gradient in gradients:
        assert gradient[own, 0].abs().sum() > 0
        assert torch.count_nonzero(gradient[~own, 0]) == 0
        assert torch.count_nonzero(gradient[:, 1]) == 0
    with torch.no_grad():
        key[~own, 0] += 100.0
        value[~own, 0] += 100.0
        changed = attend(name, query, key, value, SEGMENT_IDS, slopes, prefix_mask)
    assert torch.equal(changed[own, 0], context[own, 0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_gives_no_nan(name: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(torch.float32))
    context = attend(name, query, key, value, torch.zeros_like(SEGMENT_IDS), alibi_slopes(HEADS))
    gradients = torch.autograd.grad(context.sum(), (query, key, value))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (context, *gradients))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_dropout_drops_and_keeps_the_mean(name: str) -> None:
    torch.manual_seed(0)
    query, key, value = random_qkv(torch.float32, heads=64)
    chosen = IMPLEMENTATIONS[name]
    pattern = chosen.prepare(SEGMENT_IDS, alibi_slopes(64))
    context = chosen.attend(query, key, torch.ones_like(value), pattern, dropout=0.3)
    context = context[REAL] if name == "segments" else context
    assert context.std() > 0.1
    assert abs(float(context.mean()) - 1.0) < 0.1


def test_auto_is_segments_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for precision in ("fp32", "bf16", "fp16"):
        assert choose_packed_attention("auto", precision=precision, device="cpu").name == "segments"  # type: ignore[arg-type]
    assert "packed attention: segments" in caplog.text


def test_auto_on_a_gpu_without_triton_is_sdpa_in_fp32_and_the_reference_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert choose_packed_attention("auto", precision="fp32", device="cuda").name == "sdpa"
    assert choose_packed_attention("auto", precision="bf16", device="cuda").name == "reference"


@pytest.mark.parametrize("name", ["reference", "sdpa", "segments"])
def test_a_wish_is_met(name: str) -> None:
    chosen = choose_packed_attention(name, precision="fp32", device="cpu")  # type: ignore[arg-type]
    assert isinstance(chosen, PackedAttention) and chosen is IMPLEMENTATIONS[name]


def test_segments_on_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="made for a CPU.*Use auto, reference or sdpa"):
        choose_packed_attention("segments", precision="bf16", device="cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_wish_that_would_round_the_bias_is_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"needs precision=fp32, it is {precision}.*Use auto or reference"):
        choose_packed_attention("sdpa", precision=precision)  # type: ignore[arg-type]
