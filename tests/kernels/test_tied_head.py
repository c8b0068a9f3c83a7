"""A head whose weight is the embedding: its gradient goes to the one that is added up in fp32, and is lost nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xmtf.kernels.head_loss import VocabularyShard, chunked, head_loss, reference
from tests.kernels.test_head_loss import HIDDEN, PADDED, WORDS, problem


class Products(TorchDispatchMode):
    """Notes how many numbers the largest matrix product has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.largest = max(self.largest, result.numel())
        return result


def tied_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, of_losses: Tensor, *, of_embedding: float, main_grad: Tensor | None
) -> Tensor:
    """Return what Megatron-Core's hook makes of a head and an embedding: `main_grad` plus what autograd brings.

    The embedding looks each label up, and each of its numbers has the gradient `of_embedding`.
    """
    weight = weight.clone().requires_grad_()
    if main_grad is not None:
        weight.main_grad = main_grad  # type: ignore[attr-defined]
    shard = VocabularyShard(first=0, count=WORDS, is_embedding=True)
    losses = head_loss(hidden.clone().requires_grad_(), weight, labels, shard=shard, logits_at_once=3 * WORDS)
    embedded = torch.nn.functional.embedding(labels, weight)
    torch.autograd.backward([losses, embedded], [of_losses, torch.full_like(embedded, of_embedding)])
    assert weight.grad is not None
    return weight.grad.float() if main_grad is None else main_grad + weight.grad


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, of_losses: Tensor, of_embedding: float) -> Tensor:
    """Return the same in fp64, by torch's own cross-entropy."""
    weight = weight.double().requires_grad_()
    losses = reference.head_loss(hidden.double(), weight[:WORDS], labels)
    embedded = torch.nn.functional.embedding(labels, weight)
    torch.autograd.backward([losses, embedded], [of_losses.double(), torch.full_like(embedded, of_embedding)])
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("at_once", [1, 7 * HIDDEN, 10**9])
@pytest.mark.parametrize("before", [0.0, 2.5])
def test_main_gradient_is_that_of_both(monkeypatch: pytest.MonkeyPatch, at_once: int, before: float) -> None:
    """Added to what earlier micro-batches left there, whatever part of it is made at a time."""
    monkeypatch.setattr(chunked, "GRADIENT_AT_ONCE", at_once)
    hidden, weight, labels, of_losses = problem(20)
    expected = exact(hidden, weight, labels, of_losses, 0.25) + before
    found = tied_gradient(
        *(hidden, weight, labels, of_losses), of_embedding=0.25, main_grad=torch.full((PADDED, HIDDEN), before)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[WORDS:], torch.full_like(found[WORDS:], before)), "padded rows have no gradient"


def test_a_small_gradient_beside_a_large_one_is_kept() -> None:
    """In bf16 the sum of both loses what is below 1/256 of the embedding's; the control does."""
    hidden, weight, labels, of_losses = (
        value.to(torch.bfloat16) if value.is_floating_point() else value for value in problem(20)
    )
    of_losses = of_losses.float()
    expected = exact(hidden, weight, labels, of_losses, 512.0)
    rows = labels.unique()

    def error(found: Tensor) -> float:
        return float((found.double() - expected)[rows].abs().max())

    words = (hidden, weight, labels, of_losses)
    lost = error(tied_gradient(*words, of_embedding=512.0, main_grad=None))
    kept = error(tied_gradient(*words, of_embedding=512.0, main_grad=torch.zeros(PADDED, HIDDEN)))
    assert lost > 0.5 and kept < 0.05


def test_no_gradient_of_all_words_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "GRADIENT_AT_ONCE", 10 * HIDDEN)
    hidden, weight, labels, of_losses = problem(4)
    weight.requires_grad_()
    weight.main_grad = torch.zeros(PADDED, HIDDEN)  # type: ignore[attr-defined]
    shard = VocabularyShard(first=0, count=WORDS, is_embedding=True)
    with Products() as products:
        head_loss(hidden.requires_grad_(), weight, labels, shard=shard).backward(of_losses)
    assert weight.grad is None
    assert products.largest == 4 * WORDS, "logits; ten rows of the weight's gradient are fewer, all of them more"


def test_without_positions_nothing_is_added() -> None:
    hidden, weight, labels, of_losses = problem(0)
    found = tied_gradient(
        *(hidden, weight, labels, of_losses), of_embedding=1.0, main_grad=torch.full((PADDED, HIDDEN), 3.0)
    )
    assert torch.equal(found, torch.full((PADDED, HIDDEN), 3.0))
