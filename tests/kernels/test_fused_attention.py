"""Triton attention against the readable references in float64: packed ALiBi, prefix-LM, T5's learned bias, dropout.

Without a GPU the kernels run in Triton's interpreter. Half precision is held to twice the error of the reference in the
same precision, fp32 to 1e-5 of the largest value, and each element of packed attention to what arithmetic explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.packed_attention import choose_packed_attention, reference
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes, packed_bias
from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.kernels.relative_attention import reference as relative_reference
from megatron_xmtf.kernels.relative_attention.buckets import bias_by_distance
from megatron_xmtf.kernels.segment_attention import available, self_ranges
from tests.kernels.interpreter import DEVICE, correct_bf16
from tests.kernels.rounding import attention_bounds

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("correct_bf16", "larger_blocks")
__all__ = ["correct_bf16"]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(scope="module")
def larger_blocks() -> Iterator[None]:
    """Cut fp32 as half precision is cut: the interpreter takes as long for a small block as for a large one."""
    from megatron_xmtf.kernels.segment_attention import blocks

    larger = {}
    for kernel, kind, width in blocks.BLOCKS:
        half = "relative" if kernel == "bias_gradient" else "half"
        larger[kernel, kind, width] = blocks.BLOCKS[kernel, half if kind == "fp32" else kind, width]
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(blocks, "BLOCKS", larger)
            patch.setattr(blocks, "DROPPING", {})
        yield


def row(length: int, *segments: tuple[int, int]) -> Tensor:
    """Return segment ids: runs of (number, length), then padding."""
    runs = [torch.full((size,), number) for number, size in segments]
    padding = length - sum(size for _, size in segments)
    return torch.cat([*runs, torch.zeros(padding, dtype=torch.int64)]).long()


PACKED = torch.stack([row(131, (1, 7), (2, 1), (3, 90), (4, 20)), row(131, (1, 131))])
"""A prime length; segments of one token and of more than a block, padding; a row of one segment, a row of padding."""
PREFIX = torch.zeros_like(PACKED, dtype=torch.bool)
PREFIX[0, :3] = PREFIX[0, 8:50] = PREFIX[1, :100] = True
ENCODER = torch.stack([row(157, (1, 70), (2, 1), (4, 60)), row(157, (1, 157)), row(157)])
DECODER = torch.stack([row(83, (1, 3), (2, 40), (3, 20), (4, 1)), row(83, (1, 83)), row(83)])
SIDES = {"encoder": (ENCODER, ENCODER, False), "decoder": (DECODER, DECODER, True), "cross": (DECODER, ENCODER, False)}


def draw(*shape: int, seed: int) -> Tensor:
    """Draw in float64, so that every precision gets the same numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.cpu().double()).abs().max().detach())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return worst(found, expected) / float(expected.abs().max())


LARGEST = 2 if DEVICE == "cpu" else 4
"""Times the plain one's that the largest error may be: always the same element where kernels are interpreted, one
element's luck on a GPU, which adds in another order. The norm of the error is held to twice everywhere."""


def errs_at_most_twice(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    ours, theirs = (side.cpu().double() - exact for side in (found, plain))
    return bool(ours.norm() <= 2 * theirs.norm() and ours.abs().max() <= LARGEST * theirs.abs().max())


def run_packed(
    name: str,
    dtype: torch.dtype,
    qkv: Tensor,
    *,
    prefix: Tensor | None = None,
    segment_ids: Tensor = PACKED,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> list[Tensor]:
    """Return the context, then the gradients of query, key and value, which are slices of qkv [s, b, n, 3, d]."""
    device = DEVICE if name == "fused" else "cpu"
    fused = qkv.detach().to(device, dtype).clone().requires_grad_()
    query, key, value = fused.unbind(dim=3)
    slopes = alibi_slopes(qkv.size(2)) if slopes is None else slopes
    if name == "fused":
        chosen = choose_packed_attention("fused", precision="fp32")
        prefix = None if prefix is None else prefix.to(device)
        prepared = chosen.prepare(segment_ids.to(device), slopes.to(device), prefix)
        context = chosen.attend(query, key, value, prepared, dropout=dropout)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        bias = packed_bias(segment_ids, slopes.to(wide), prefix)
        context = reference.packed_attention(query, key, value, bias) * (segment_ids.t() > 0)[:, :, None]
    cotangent = draw(*context.shape, seed=99).to(torch.bfloat16).to(device, dtype)
    (gradient,) = torch.autograd.grad(context, fused, cotangent)
    return [context.detach(), *gradient.unbind(dim=3)]


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "prefix"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 24), (torch.bfloat16, 80), (torch.float16, 128)], ids=str
)
def test_packed_attention_forward_and_backward(dtype: torch.dtype, head_dim: int, prefix: Tensor | None) -> None:
    qkv = draw(131, 2, 2, 3, head_dim, seed=0).to(dtype)
    exact = run_packed("reference", torch.float64, qkv, prefix=prefix)
    found = run_packed("fused", dtype, qkv, prefix=prefix)
    plain = run_packed("reference", dtype, qkv, prefix=prefix)
    cotangent = draw(*exact[0].shape, seed=99).to(torch.bfloat16).double() * (PACKED.t() > 0)[:, :, None]
    bias = packed_bias(PACKED, alibi_slopes(2).double(), prefix)
    bounds = attention_bounds(*qkv.double().unbind(dim=3), bias, cotangent, dtype=dtype)
    names = ("context", "d query", "d key", "d value")
    for what, ours, theirs, wanted, bound in zip(names, found, plain, exact, bounds, strict=True):
        assert ours.dtype == dtype
        assert bool(((ours.cpu().double() - wanted).abs() <= bound).all()), what
        if dtype == torch.float32:
            assert relative_error(ours, wanted) < 1e-5, what
        else:
            assert errs_at_most_twice(ours, theirs, wanted), what
        assert not ours.cpu()[(PACKED == 0).t()].any(), f"{what} of padding is 0"


@pytest.mark.parametrize(
    ("fault", "given"),
    [
        ("flipped ALiBi", {"slopes": -alibi_slopes(2)}),
        ("heads in another order", {"slopes": alibi_slopes(2).flip(0)}),
        ("leaked segment", {"segment_ids": (PACKED > 0).long()}),
        ("a token too many in a segment", {"segment_ids": torch.where(PACKED == 3, 2, PACKED)}),
        ("inputs seen backwards alone", {}),
    ],
)
def test_a_deliberate_fault_is_seen(fault: str, given: dict[str, Tensor]) -> None:
    prefix = PREFIX if fault.startswith("inputs") else None
    qkv = draw(131, 2, 2, 3, 16, seed=1).float()
    exact = run_packed("reference", torch.float64, qkv, prefix=prefix)
    found = run_packed("fused", torch.float32, qkv, **given)
    assert all(relative_error(ours, wanted) > 0.01 for ours, wanted in zip(found, exact, strict=True)), fault


def test_positions_beyond_256_keep_their_bias_in_bf16() -> None:
    # Equal scores: the weights are those of the bias alone, 1, 0.61, 0.37 ... from the query backwards.
    segment_ids, slopes = torch.ones(1, 600, dtype=torch.int64), torch.tensor([0.5])
    qkv = draw(600, 1, 1, 3, 16, seed=2)
    qkv[:, :, :, 0] = 0.0
    qkv = qkv.bfloat16()
    exact, *_ = run_packed("reference", torch.float64, qkv, segment_ids=segment_ids, slopes=slopes)
    found, *_ = run_packed("fused", torch.bfloat16, qkv, segment_ids=segment_ids, slopes=slopes)
    assert relative_error(found, exact) < 2**-8  # half a unit in the last of 8 bits, in the weights and in the result
    # Negative control: `transformers` takes the key's position in the model's precision; bf16 has integers up to 256.
    position = (torch.arange(600) * 0.5).bfloat16().double().expand(1, 1, 600, 600)
    rounded = position.masked_fill(~packed_bias(segment_ids, slopes).isfinite(), float("-inf"))
    query, key, value = qkv.double().unbind(dim=3)
    broken = reference.packed_attention(query, key, value, rounded)
    assert relative_error(broken[:256], exact[:256]) < 1e-12
    assert relative_error(broken[256:], exact[256:]) > 0.1


def test_a_segment_neither_sees_nor_moves_another() -> None:
    qkv = draw(131, 2, 2, 3, 16, seed=3).float()
    own = PACKED[0] == 3
    before = run_packed("fused", torch.float32, qkv)
    qkv = qkv.detach().clone()
    qkv[~own, 0] += 100.0
    after = run_packed("fused", torch.float32, qkv)
    for changed, kept in zip(after, before, strict=True):
        assert torch.equal(changed[own, 0], kept[own, 0])
        assert torch.equal(changed[:, 1], kept[:, 1])


def test_a_row_of_padding_gives_zeros() -> None:
    qkv = draw(40, 1, 1, 3, 16, seed=4).float()
    for tensor in run_packed("fused", torch.float32, qkv, segment_ids=torch.zeros(1, 40, dtype=torch.int64)):
        assert not tensor.any()


def test_rows_that_lie_far_apart_are_found(tmp_path: Path) -> None:
    # Three tokens 1.2e9 numbers apart: the third begins beyond 2^31. A sparse file takes no room on the disk.
    if DEVICE != "cpu":
        pytest.skip("the sparse file is memory of the CPU")
    from megatron_xmtf.kernels.segment_attention.attend import attend_ranges

    stride, sequence, head_dim = 1_200_000_000, 3, 16
    size = (sequence - 1) * stride + head_dim
    storage = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), shared=True, nbytes=2 * size)
    far = torch.tensor([], dtype=torch.float16).set_(storage).as_strided((3, 1, 1, head_dim), (stride, 16, 16, 1))
    near = draw(3, 1, 1, head_dim, seed=5).half()
    far.copy_(near)
    ranges = self_ranges(torch.ones(1, 3, dtype=torch.int64), causal=True)
    found = attend_ranges(far, far, far, ranges, scale=0.25)
    assert torch.equal(found, attend_ranges(near, near, near, ranges, scale=0.25))


def run_relative(name: str, side: str, dtype: torch.dtype, *, table: Tensor | None, scale: float) -> list[Tensor]:
    """Return the context, then the gradients of query, key and value, and of the table if there is one."""
    device = DEVICE if name == "fused" else "cpu"
    queries, keys, causal = (t.to(device) if isinstance(t, Tensor) else t for t in SIDES[side])
    lengths = (queries.size(1), keys.size(1), keys.size(1))
    drawn = [draw(length, 3, 2, 40, seed=number) for number, length in enumerate(lengths)]
    drawn[0] *= 0.3  # scores without scaling spread over a few units, as those of a trained T5
    inputs = [tensor.to(torch.bfloat16).to(device, dtype).requires_grad_() for tensor in drawn]
    bias, wide = None, torch.promote_types(dtype, torch.float32)
    if table is not None:
        inputs.append(table.to(device, wide).requires_grad_())
        bias = bias_by_distance(inputs[3], length=max(lengths), bidirectional=not causal, max_distance=20)
    if name == "fused":
        chosen: Any = choose_relative_attention("fused")
        prepare, attend = chosen.prepare, chosen.attend
    else:
        prepare, attend = relative_reference.find_dense_segments, relative_reference.relative_attention
    context = attend(inputs[0], inputs[1], inputs[2], bias, prepare(queries, keys, causal=causal), scale=scale)
    cotangent = draw(*context.shape, seed=9).to(torch.bfloat16).to(device, dtype)
    return [context.detach(), *torch.autograd.grad(context, inputs, cotangent)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("side", SIDES)
def test_relative_attention_with_the_gradient_of_its_table(side: str, dtype: torch.dtype) -> None:
    table = None if side == "cross" else draw(16, 2, seed=7)
    exact = run_relative("reference", side, torch.float64, table=table, scale=1.0)
    found = run_relative("fused", side, dtype, table=table, scale=1.0)
    plain = run_relative("reference", side, dtype, table=table, scale=1.0)
    for what, ours, theirs, wanted in zip(
        ("context", "d query", "d key", "d value", "d table"), found, plain, exact, strict=False
    ):
        if dtype == torch.float32:
            assert relative_error(ours, wanted) < 1e-5, what
        else:
            assert errs_at_most_twice(ours.detach(), theirs.detach(), wanted.detach()), what
    padding = (SIDES[side][0] == 0).t()
    assert not found[0].cpu()[padding].any() and not found[1].cpu()[padding].any()
    if side == "cross":  # decoder segment 3 has no encoder tokens
        assert not found[0].cpu()[(DECODER == 3).t()].any()


def test_a_table_read_from_the_wrong_side_is_seen() -> None:
    table = draw(16, 2, seed=7)
    exact = run_relative("reference", "encoder", torch.float64, table=table, scale=1.0)
    mirrored = torch.cat([table[8:], table[:8]])  # buckets of earlier and later keys exchanged
    found = run_relative("fused", "encoder", torch.float32, table=mirrored, scale=1.0)
    assert relative_error(found[0], exact[0]) > 0.1
    assert relative_error(found[4], exact[4]) > 0.1


SHORT = torch.stack([row(29, (1, 17), (2, 5)), row(29, (1, 29))])


def attend_short(query: Tensor, key: Tensor, value: Tensor, *, seed: int, dropout: float = 0.3) -> Tensor:
    chosen = choose_packed_attention("fused", precision="fp32")
    torch.manual_seed(seed)
    prepared = chosen.prepare(SHORT.to(DEVICE), alibi_slopes(2).to(DEVICE))
    return chosen.attend(query, key, value, prepared, dropout=dropout)


def dropped_weights(query: Tensor, key: Tensor, *, seed: int) -> Tensor:
    """Return the weights after dropout, [q, b, n, k]: the context of values that are unit vectors."""
    units = torch.eye(29, device=DEVICE)[:, None, None].expand(29, 2, 2, 29)
    units = torch.nn.functional.pad(units, (0, 3))
    padded = (torch.nn.functional.pad(tensor, (0, 32 - tensor.size(-1))) for tensor in (query, key))
    return attend_short(*padded, units, seed=seed).unflatten(2, (2, 32))[..., :29]


def test_dropout_is_the_same_in_the_backward_pass() -> None:
    query, key, value = (draw(29, 2, 2, 32, seed=seed).float().to(DEVICE) for seed in range(3))
    masks = dropped_weights(query, key, seed=5) != 0.0  # [q, b, n, k]
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    context = attend_short(*inputs, seed=5)
    cotangent = draw(*context.shape, seed=9)
    found = torch.autograd.grad(context, inputs, cotangent.float().to(DEVICE))
    wide = [tensor.double().cpu().requires_grad_() for tensor in (query, key, value)]
    bias = packed_bias(SHORT, alibi_slopes(2).double())
    scores = torch.einsum("qbnd,kbnd->bnqk", wide[0], wide[1]) * 32**-0.5 + bias
    weights = scores.softmax(-1) * masks.cpu().permute(1, 2, 0, 3) / 0.7
    exact = torch.einsum("bnqk,kbnd->qbnd", weights, wide[2]).flatten(2) * (SHORT.t() > 0)[:, :, None]
    assert relative_error(context.detach(), exact.detach()) < 1e-5
    for ours, wanted in zip(found, torch.autograd.grad(exact, wide, cotangent), strict=True):
        assert relative_error(ours, wanted) < 1e-5


def test_dropout_drops_its_share_and_differs_by_head_row_and_seed() -> None:
    query = key = torch.zeros(29, 2, 2, 16, device=DEVICE)
    visible = torch.isfinite(packed_bias(SHORT, torch.ones(2))).permute(2, 0, 1, 3) & (SHORT.t() > 0)[..., None, None]
    draws = torch.stack([dropped_weights(query, key, seed=seed).cpu() != 0.0 for seed in range(6)])
    assert not draws[:, ~visible].any()
    count = int(visible.sum()) * len(draws)
    # Four standard deviations of a share of 0.7.
    assert abs(float(draws[:, visible].double().mean()) - 0.7) < 4 * (0.7 * 0.3 / count) ** 0.5
    both = visible[:, :, 0]
    assert not torch.equal(draws[0][:, :, 0][both], draws[0][:, :, 1][both]), "heads"
    assert not torch.equal(draws[0][:17, 0, 0, :17], draws[0][:17, 1, 0, :17]), "rows"
    assert not torch.equal(draws[0], draws[1]), "seeds"
    assert torch.equal(dropped_weights(query, key, seed=0).cpu() != 0.0, draws[0])


@pytest.fixture
def other_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Return a function that makes all blocks 16 x 16 from then on."""
    from megatron_xmtf.kernels.segment_attention import blocks

    def change() -> None:
        smaller = {place: blocks.Blocks(16, 16, 4, 1) for place in blocks.BLOCKS}
        monkeypatch.setattr(blocks, "BLOCKS", smaller)
        monkeypatch.setattr(blocks, "DROPPING", {})

    yield change


def test_results_and_dropout_do_not_depend_on_how_work_is_cut(other_blocks: Callable[[], None]) -> None:
    qkv = draw(29, 2, 2, 3, 16, seed=6).float()
    torch.manual_seed(1)
    before = run_packed("fused", torch.float32, qkv, segment_ids=SHORT, dropout=0.3)
    other_blocks()
    torch.manual_seed(1)
    after = run_packed("fused", torch.float32, qkv, segment_ids=SHORT, dropout=0.3)
    for found, wanted in zip(after, before, strict=True):
        assert relative_error(found, wanted) < 1e-6


def test_the_bias_gradient_does_not_depend_on_how_work_is_cut(other_blocks: Callable[[], None]) -> None:
    from megatron_xmtf.kernels.segment_attention.attend import attend_ranges

    ranges = self_ranges(SHORT[:1].to(DEVICE), causal=False)
    query, key, value = (draw(29, 1, 1, 16, seed=seed).float().to(DEVICE) for seed in range(3))
    found = []
    for _ in range(2):
        bias = draw(1, 2 * 29 - 1, seed=4).float().to(DEVICE).requires_grad_()
        context = attend_ranges(query, key, value, ranges, scale=1.0, bias_by_distance=bias)
        found += torch.autograd.grad((context * draw(29, 1, 16, seed=5).float().to(DEVICE)).sum(), bias)
        other_blocks()
    assert relative_error(found[1], found[0]) < 1e-6
    assert found[0].abs().min() == 0.0 < found[0].abs().max(), "distances beyond the segment get nothing"


def test_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_packed_attention("auto", precision="bf16", device="cuda").name == "fused"
    assert choose_relative_attention("auto", device="cuda").name == "fused"
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert choose_packed_attention("auto", precision="bf16", device="cuda").name == "reference"
    assert choose_packed_attention("auto", precision="fp32", device="cuda").name == "sdpa"
    assert choose_relative_attention("auto", device="cuda").name == "reference"


@pytest.mark.parametrize(
    ("obstacle", "given"),
    [("package triton, which is not installed", {"device": "cuda"}), ("have 160", {"head_dim": 160})],
)
def test_a_wish_for_fused_that_cannot_be_met(
    obstacle: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "triton" in obstacle:
        monkeypatch.setattr(available, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=obstacle):
        choose_packed_attention("fused", precision="bf16", **given)
    with pytest.raises(ConfigError, match=obstacle):
        choose_relative_attention("fused", **given)


def test_a_cpu_is_refused_where_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="compiles for GPUs, and this run computes on a CPU"):
        choose_packed_attention("fused", precision="bf16", device="cpu")


def test_a_gpu_without_a_c_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(available.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C compiler to start its kernels: gcc or clang"):
        choose_packed_attention("fused", precision="bf16", device="cuda")
