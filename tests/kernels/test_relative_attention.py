"""Attention of encoder-decoders: buckets and bias of `transformers`, isolated segments, every gradient, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.relative_attention import choose_relative_attention, reference, segments
from megatron_xmtf.kernels.relative_attention.buckets import bias_by_distance, distance_buckets

HEADS, HEAD_DIM = 3, 5
ENCODER = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0], [0] * 12])
DECODER = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2], [0] * 9])
KINDS = {"encoder": (ENCODER, ENCODER, False), "decoder": (DECODER, DECODER, True), "cross": (DECODER, ENCODER, False)}
FAST = ["segments", "reference"]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (32, 100), (16, 300)])
def test_buckets_are_those_of_transformers(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distance = torch.arange(-700, 701)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    ours = distance_buckets(distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_bias_is_that_of_transformers(is_decoder: bool) -> None:
    config = T5Config(num_heads=HEADS, is_decoder=is_decoder, relative_attention_num_buckets=8)
    attention = T5Attention(config, has_relative_attention_bias=True)
    table = attention.relative_attention_bias.weight
    theirs = attention.compute_bias(9, 9)[0]  # [n, query, key]
    ours = bias_by_distance(table, length=12, bidirectional=not is_decoder, max_distance=128)
    place = torch.arange(9)
    assert torch.equal(ours[:, place[None] - place[:, None] + 11], theirs)


def tensors(kind: str, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    queries, keys, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    found = {
        "query": draw(queries.size(1), 3, HEADS, HEAD_DIM),
        "key": draw(keys.size(1), 3, HEADS, HEAD_DIM),
        "value": draw(keys.size(1), 3, HEADS, HEAD_DIM),
    }
    return found if kind == "cross" else {**found, "bias": draw(HEADS, 2 * 12 - 1)}


def attend(name: str, kind: str, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    chosen = choose_relative_attention(name, device="cpu")
    queries, keys, causal = KINDS[kind]
    prepared = chosen.prepare(queries, keys, causal=causal)
    bias = inputs.get("bias")
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    return chosen.attend(q, k, v, bias, prepared, **{"scale": 1.0, **settings})


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def by_hand(kind: str, inputs: dict[str, Tensor], scale: float) -> Tensor:
    """Oracle: each segment cut out and attended alone, in torch's own attention with a dense mask."""
    queries, keys, causal = KINDS[kind]
    output = torch.zeros(queries.size(1), 3, HEADS, HEAD_DIM, dtype=torch.float64)
    for row in range(3):
        for number in range(1, int(queries[row].max()) + 1):
            q_at, k_at = (queries[row] == number).nonzero()[:, 0], (keys[row] == number).nonzero()[:, 0]
            q, k, v = (
                inputs[name][at, row].transpose(0, 1) for name, at in (("query", q_at), ("key", k_at), ("value", k_at))
            )
            mask = torch.zeros(HEADS, len(q_at), len(k_at), dtype=torch.float64)
            if "bias" in inputs:
                mask = mask + inputs["bias"][:, k_at[None] - q_at[:, None] + 11]
            if causal:
                mask = mask.masked_fill(k_at[None] > q_at[:, None], float("-inf"))
            context = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            output = output.index_put((q_at, torch.tensor(row)), context.transpose(0, 1))
    return output.flatten(2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1.0, HEAD_DIM**-0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAST)
def test_equals_segments_attended_alone(
    name: str, kind: str, scale: float, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "QUERY_BLOCK", 3)
    exact = tensors(kind, torch.float64)
    wanted = by_hand(kind, exact, scale)
    inputs = {key: value.detach().float().requires_grad_() for key, value in exact.items()}
    output = attend(name, kind, inputs, scale=scale, recompute=recompute)
    assert torch.allclose(output.double(), wanted, atol=1e-5)
    found = gradients(output, inputs)
    for key, gradient in gradients(wanted, exact).items():
        assert float((found[key] - gradient).abs().max() / gradient.abs().max()) <= 1e-5, key


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_reference_are_those_of_finite_differences(causal: bool) -> None:
    """Of queries, keys, values, and the bias, which all segments of a row share."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([[1, 1, 2, 2, 0]])
    visible = reference.find_dense_segments(numbers, numbers, causal=causal)
    inputs = [torch.randn(5, 1, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 2 * 5 - 1, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *tensors: reference.relative_attention(*tensors, visible, scale=1.0), [*inputs, bias]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_at_most_twice_as_far_off_as_torch(kind: str) -> None:
    exact = tensors(kind, torch.bfloat16)
    exact = {key: value.detach().double().requires_grad_() for key, value in exact.items()}
    wanted = by_hand(kind, exact, 1.0)
    of_wanted = gradients(wanted, exact)
    errors = {}
    for name in FAST:
        inputs = {key: value.detach().bfloat16().requires_grad_() for key, value in exact.items()}
        output = attend(name, kind, inputs)
        found = gradients(output, inputs)
        of_gradients = {key: float((found[key] - g).abs().max()) for key, g in of_wanted.items()}
        errors[name] = {"output": float((output - wanted).detach().abs().max()), **of_gradients}
    for key, error in errors["segments"].items():
        assert error <= 2 * errors["reference"][key] + 1e-6, key


@pytest.mark.parametrize("name", FAST)
def test_padding_gets_zeros_and_no_gradient(name: str) -> None:
    inputs = tensors("cross", torch.float32)
    output = attend(name, "cross", inputs)
    assert not output.transpose(0, 1)[DECODER == 0].any()
    found = gradients(output, inputs)
    assert not found["key"].transpose(0, 1)[ENCODER == 0].any()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_same_in_the_backward_pass(kind: str, recompute: bool) -> None:
    # For a fixed seed the output is a smooth function; its numerical derivative is that of the same masks.
    def run(inputs: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return attend("segments", kind, inputs, dropout=0.4, recompute=recompute)

    inputs = tensors(kind, torch.float32)
    found = gradients(run(inputs), inputs)
    weight = torch.randn(run(inputs).shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for key in inputs:
        step = torch.randn(inputs[key].shape, generator=torch.Generator().manual_seed(4)) * 1e-2
        ends = [{**inputs, key: (inputs[key] + sign * step).detach()} for sign in (1, -1)]
        after, before = (float((run(end).detach().double() * weight).sum()) for end in ends)
        assert (after - before) / 2 == pytest.approx(float((found[key] * step).sum()), rel=2e-3, abs=1e-4), key


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    inputs = {key: value.detach() for key, value in tensors("encoder", torch.float32).items()}
    inputs["value"] = torch.ones_like(inputs["value"])
    draws = torch.stack([attend("segments", "encoder", inputs, dropout=0.25) for _ in range(400)])
    seen = draws[:, ENCODER.t() > 0]
    assert float(seen.mean()) == pytest.approx(1.0, abs=0.01)
    # Segment 3 of the first row sees itself alone: it is dropped whole or counted 1 / 0.75 times.
    alone = draws[:, 10, 0]
    assert float((alone == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="sdpa is made for decoder models"):
        choose_relative_attention("sdpa", device="cpu")
    with pytest.raises(ConfigError, match="made for a CPU"):
        choose_relative_attention("segments", device="cuda")
    assert choose_relative_attention("auto", device="cpu").name == "segments"


def test_a_segment_in_two_places_is_no_packed_row() -> None:
    broken = torch.tensor([[1, 2, 1]])
    with pytest.raises(AssertionError, match="two places"):
        segments.find_segment_runs(broken, broken, causal=False)


def test_the_oracle_sees_a_leaked_segment() -> None:
    inputs = tensors("encoder", torch.float64)
    leaked = reference.find_dense_segments((ENCODER > 0).long(), (ENCODER > 0).long(), causal=False)
    output = reference.relative_attention(
        inputs["query"], inputs["key"], inputs["value"], inputs["bias"], leaked, scale=1.0
    )
    assert float((output - by_hand("encoder", inputs, 1.0)).abs().max()) > 0.1
