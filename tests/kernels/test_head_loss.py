"""The chunked head against the plain one: losses, gradients, memory, and a vocabulary split over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.kernels.head_loss import VocabularyShard, choose_head_loss, chunked, head_loss, reference
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel

HIDDEN, WORDS, PADDED = 16, 100, 128


def problem(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [n, h], weight [padded, h], labels [n] and the gradient of the losses [n], zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, WORDS, (count,), generator=generator)
    of_losses = torch.rand(count, generator=generator) * (torch.arange(count) % 3 > 0)
    return hidden, weight, labels, of_losses


def losses_and_gradients(function: Any, hidden: Tensor, weight: Tensor, of_losses: Tensor) -> list[Tensor]:
    """Return losses, the gradient of hidden and that of the weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = function(hidden, weight)
    assert losses.dtype == torch.promote_types(hidden.dtype, torch.float32)
    losses.backward(of_losses)
    assert hidden.grad is not None and weight.grad is not None
    return [losses.detach(), hidden.grad, weight.grad]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, of_losses: Tensor) -> list[Tensor]:
    return losses_and_gradients(
        lambda hidden, weight: reference.head_loss(hidden, weight[:WORDS], labels), hidden, weight, of_losses
    )


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest max|difference| / max|expected|."""
    return max(
        float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("logits_at_once", [1, WORDS * 3, WORDS * 7, WORDS * 20, 10**9])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_equals_the_plain_head(count: int, logits_at_once: int) -> None:
    hidden, weight, labels, of_losses = problem(count)
    of_losses[0] = 0.5
    shard = VocabularyShard(first=0, count=WORDS)
    found = losses_and_gradients(
        lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once),
        hidden,
        weight,
        of_losses,
    )
    assert worst(found, plain(hidden, weight, labels, of_losses)) <= 1e-6
    assert not found[2][WORDS:].any(), "rows that only pad the vocabulary get no gradient"


def test_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, 3, generator=generator, dtype=torch.float64, requires_grad=True) for size in (4, 8)
    )
    labels = torch.tensor([0, 6, 3, 3])
    for shard in (None, VocabularyShard(first=0, count=7)):  # of 7 words the eighth row only pads
        assert torch.autograd.gradcheck(
            lambda h, w, s=shard: reference.head_loss(h, w, labels, shard=s), [hidden, weight]
        )


@pytest.mark.parametrize("logits_at_once", [WORDS * 5, 10**9])
def test_gradients_are_those_of_finite_differences(logits_at_once: int) -> None:
    hidden, weight, labels, of_losses = problem(11)
    shard = VocabularyShard(first=0, count=WORDS)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once)
        return (losses.double() * of_losses).sum()

    _, of_hidden, of_weight = losses_and_gradients(
        lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once),
        hidden,
        weight,
        of_losses,
    )
    direction = torch.randn(hidden.shape), torch.randn(weight.shape)
    step = 1e-2
    ahead = total(hidden + step * direction[0], weight + step * direction[1])
    behind = total(hidden - step * direction[0], weight - step * direction[1])
    slope = float((of_hidden * direction[0]).sum() + (of_weight * direction[1]).sum())
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_at_once", [WORDS * 5, 10**9])
def test_half_precision_errs_at_most_twice_as_much_as_the_plain_head(dtype: torch.dtype, logits_at_once: int) -> None:
    hidden, weight, labels, of_losses = problem(40, dtype)
    exact = plain(hidden.double(), weight.double(), labels, of_losses)
    shard = VocabularyShard(first=0, count=WORDS)
    found = losses_and_gradients(
        lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once),
        hidden,
        weight,
        of_losses,
    )
    theirs = plain(hidden, weight, labels, of_losses)
    for ours, other, truth in zip(found, theirs, exact, strict=True):
        assert ours.dtype == other.dtype
        assert worst([ours], [truth]) <= 2 * worst([other], [truth]) + 1e-6


def test_without_positions_gradients_are_zeros() -> None:
    hidden, weight, labels, of_losses = problem(0)
    shard = VocabularyShard(first=0, count=WORDS)
    losses, of_hidden, of_weight = losses_and_gradients(
        lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard), hidden, weight, of_losses
    )
    assert losses.shape == (0,) and of_hidden.shape == (0, HIDDEN)
    assert of_weight.shape == weight.shape and not of_weight.any()


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, of fp32 too, and whether one waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.largest_fp32, self.waits = 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.waits |= func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                if value.dtype == torch.float32:
                    self.largest_fp32 = max(self.largest_fp32, value.numel())
        return result


def test_no_more_logits_are_held_than_allowed_and_nothing_waits() -> None:
    hidden, weight, labels, of_losses = problem(500)
    shard = VocabularyShard(first=0, count=WORDS)
    allowed = 40 * WORDS
    with Watch() as ours:
        losses_and_gradients(
            lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard, logits_at_once=allowed),
            hidden,
            weight,
            of_losses,
        )
    with Watch() as whole:
        plain(hidden, weight, labels, of_losses)
    assert whole.largest == 500 * WORDS
    assert ours.largest == 500 * HIDDEN > allowed and not ours.waits


def test_half_precision_holds_neither_the_weight_s_gradient_nor_a_chunk_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, labels, of_losses = problem(8, torch.bfloat16)
    monkeypatch.setattr(chunked, "WIDE_AT_ONCE", 2 * WORDS)
    with Watch() as watch:
        losses_and_gradients(
            lambda hidden, weight: head_loss(
                hidden, weight, labels, shard=VocabularyShard(first=0, count=WORDS), logits_at_once=4 * WORDS
            ),
            hidden,
            weight,
            of_losses,
        )
    assert watch.largest == PADDED * HIDDEN and watch.largest_fp32 == 2 * WORDS


def test_a_second_backward_pass_is_an_error_not_another_gradient() -> None:
    hidden, weight, labels, of_losses = problem(5)
    hidden.requires_grad_()
    losses = head_loss(hidden, weight.requires_grad_(), labels, shard=VocabularyShard(first=0, count=WORDS))
    losses.backward(of_losses, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward(of_losses)


def rank_difference(words: int, count: int, logits_at_once: int) -> tuple[float, Tensor]:
    """Compare this rank's half of the vocabulary with the plain head; return the difference and the losses."""
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    rank, half = torch.distributed.get_rank(), PADDED // 2
    hidden, weight, labels, of_losses = problem(count)
    labels = labels % words
    own = max(0, min(half, words - rank * half))
    shard = VocabularyShard(first=rank * half, count=own, group=torch.distributed.group.WORLD)
    losses, of_hidden, of_weight = losses_and_gradients(
        lambda hidden, weight: head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once),
        hidden,
        weight[rank * half : (rank + 1) * half],
        of_losses,
    )
    expected = losses_and_gradients(
        lambda hidden, weight: reference.head_loss(hidden, weight[:words], labels), hidden, weight, of_losses
    )
    mine = expected[2][rank * half : (rank + 1) * half]
    if not own:
        assert not of_weight.any()
        return worst([losses, of_hidden], expected[:2]), losses
    return worst([losses, of_hidden, of_weight], [*expected[:2], mine]), losses


def reference_difference(words: int) -> float:
    """Compare the reference over this rank's half of the vocabulary with torch's over all of it."""
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    rank, half = torch.distributed.get_rank(), PADDED // 2
    hidden, weight, labels, of_losses = problem(20)
    labels = labels % words
    own = slice(rank * half, (rank + 1) * half)
    shard = VocabularyShard(
        first=own.start, count=max(0, min(half, words - own.start)), group=torch.distributed.group.WORLD
    )
    split = choose_head_loss("reference")
    found = losses_and_gradients(
        lambda hidden, weight: split(hidden, weight, labels, shard=shard), hidden, weight[own], of_losses
    )
    losses, of_hidden, of_weight = losses_and_gradients(
        lambda hidden, weight: torch.nn.functional.cross_entropy(hidden @ weight[:words].t(), labels, reduction="none"),
        hidden,
        weight,
        of_losses,
    )
    assert not found[2][shard.count :].any(), "rows that only pad the vocabulary get no gradient"
    return worst(found[:2], [losses, of_hidden]) + float((found[2] - of_weight[own]).abs().max())


@pytest.mark.parametrize("words", [WORDS, PADDED, 50])
def test_the_reference_of_a_split_vocabulary_is_exact(words: int) -> None:
    assert max(run_ranks(reference_difference, world_size=2, arguments=(words,))) <= 1e-5


@pytest.mark.parametrize("words", [WORDS, PADDED, 50])  # 50: the second rank has no real word at all
@pytest.mark.parametrize("logits_at_once", [200, 10**9])
def test_a_split_vocabulary_is_exact(words: int, logits_at_once: int) -> None:
    results = run_ranks(rank_difference, world_size=2, arguments=(words, 20, logits_at_once))
    assert max(difference for difference, _ in results) <= 1e-6
    assert torch.equal(results[0][1], results[1][1]), "every rank has the same losses"
