"""The head and its loss in Triton, against the plain head in float64 and against the chunked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.head_loss import VocabularyShard, choose_head_loss, chunked, reference
from megatron_xmtf.kernels.segment_attention import available
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.kernels.interpreter import DEVICE, correct_bf16

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("correct_bf16")
__all__ = ["correct_bf16"]

HIDDEN, WORDS, PADDED, COUNT = 16, 5_003, 5_120, 11
"""A prime number of words, more than one step of a kernel takes."""


def problem(dtype: torch.dtype, *, words: int = WORDS, padded: int = PADDED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [n, h], weight [padded, h], labels [n] and the gradient of the losses [n], zeros among them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(COUNT, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(padded, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, words, (COUNT,), generator=generator)
    labels[:2] = torch.tensor([0, words - 1])
    of_losses = torch.rand(COUNT, generator=generator) * (torch.arange(COUNT) % 3 > 0)
    return hidden, weight, labels, of_losses


def losses_and_gradients(function: Any, hidden: Tensor, weight: Tensor, of_losses: Tensor) -> list[Tensor]:
    """Return losses, the gradient of hidden and that of the weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = function(hidden, weight)
    losses.backward(of_losses)
    assert hidden.grad is not None and weight.grad is not None
    return [losses.detach(), hidden.grad, weight.grad]


def worst(found: Tensor, expected: Tensor) -> float:
    """Return max|difference| / max|expected|."""
    return float((found.cpu().double() - expected.cpu().double()).abs().max() / expected.double().abs().max())


def fused(labels: Tensor, shard: VocabularyShard, logits_at_once: int) -> Any:
    loss = choose_head_loss("fused")
    return lambda hidden, weight: loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once)


@pytest.mark.parametrize("logits_at_once", [WORDS * 3, 10**9], ids=["chunks", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_losses_and_gradients(dtype: torch.dtype, logits_at_once: int) -> None:
    hidden, weight, labels, of_losses = problem(dtype)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.head_loss(hidden, weight[:WORDS], labels)

    exact = losses_and_gradients(plain, hidden.double(), weight.double(), of_losses)
    theirs = losses_and_gradients(plain, hidden, weight, of_losses)
    function = fused(labels.to(DEVICE), VocabularyShard(first=0, count=WORDS), logits_at_once)
    found = losses_and_gradients(function, *(tensor.to(DEVICE) for tensor in (hidden, weight, of_losses)))
    for what, ours, other, wanted in zip(("loss", "d hidden", "d weight"), found, theirs, exact, strict=True):
        assert ours.dtype == (torch.float32 if what == "loss" else dtype)
        if dtype == torch.float32:
            assert worst(ours, wanted) < 1e-6, what
        else:
            assert worst(ours, wanted) <= 2 * worst(other, wanted) + 1e-6, what
    assert not found[2][WORDS:].any(), "rows that only pad the vocabulary get no gradient"


@pytest.mark.parametrize("fault", ["a label one further", "padded rows among the words"])
def test_a_deliberate_fault_is_seen(fault: str) -> None:
    hidden, weight, labels, of_losses = problem(torch.float32)
    count = WORDS
    wanted = losses_and_gradients(
        lambda hidden, weight: reference.head_loss(hidden, weight[:WORDS], labels), hidden, weight, of_losses
    )
    if fault.startswith("a label"):
        labels = (labels + 1) % WORDS
    else:
        count = PADDED
    function = fused(labels.to(DEVICE), VocabularyShard(first=0, count=count), 10**9)
    found = losses_and_gradients(function, *(tensor.to(DEVICE) for tensor in (hidden, weight, of_losses)))
    assert worst(found[0], wanted[0]) > 1e-4


def test_a_second_backward_pass_is_an_error_not_another_gradient() -> None:
    hidden, weight, labels, of_losses = (tensor.to(DEVICE) for tensor in problem(torch.float32))
    function = fused(labels, VocabularyShard(first=0, count=WORDS), 10**9)
    losses = function(hidden.requires_grad_(), weight.requires_grad_())
    losses.backward(of_losses, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward(of_losses)


def test_without_positions_gradients_are_zeros() -> None:
    hidden, weight, labels, of_losses = (tensor.to(DEVICE) for tensor in problem(torch.float32))
    function = fused(labels[:0], VocabularyShard(first=0, count=WORDS), 10**9)
    losses, of_hidden, of_weight = losses_and_gradients(function, hidden[:0], weight, of_losses[:0])
    assert losses.shape == (0,) and of_hidden.shape == (0, HIDDEN) and not of_weight.any()


def rank_difference(words: int, padded: int) -> list[float]:
    """Compare this rank's half of the vocabulary, fused, with the same half, chunked."""
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    rank, half = torch.distributed.get_rank(), padded // 2
    hidden, weight, labels, of_losses = problem(torch.float32, words=words, padded=padded)
    own = max(0, min(half, words - rank * half))
    shard = VocabularyShard(first=rank * half, count=own, group=torch.distributed.group.WORLD)
    mine = weight[rank * half : (rank + 1) * half]
    found = losses_and_gradients(fused(labels, shard, half * 4), hidden, mine, of_losses)
    exact = losses_and_gradients(
        lambda hidden, weight: chunked.head_loss(hidden, weight, labels, shard=shard), hidden, mine, of_losses
    )
    return [worst(ours, wanted) for ours, wanted in zip(found, exact, strict=True)]


def test_seventy_thousand_words_split_over_two_ranks() -> None:
    if DEVICE != "cpu":
        pytest.skip("ranks of this test run over gloo")
    for differences in run_ranks(rank_difference, world_size=2, arguments=(70_001, 70_144)):
        assert max(differences) <= 1e-6


def test_a_wish_for_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_head_loss("auto", device="cpu") is chunked.head_loss
    assert choose_head_loss("auto", device="cuda").__module__.endswith("head_loss.fused")
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert choose_head_loss("auto", device="cuda") is chunked.head_loss
    with pytest.raises(ConfigError, match="package triton, which is not installed"):
        choose_head_loss("fused", device="cuda")
