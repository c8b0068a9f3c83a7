"""The head computed where a loss is, beside Megatron-Core's full head, both against one in float64; every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, empty_row, pack_examples
from megatron_xmtf.kernels.head_loss import VocabularyShard, chunked
from megatron_xmtf.models.forward import run_forward
from megatron_xmtf.models.head import VocabularyHead
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.layouts import layout
from tests.parallel.tiny_engine import SEQUENCE, build_engine, forward_backward, named_weights, run_config
from tests.tiny import random_examples

NEAREST = 1e-6
"""max|error| / max|exact| of what the head itself gives: losses, and the gradients that pass no layer on their way."""
TWICE = 2.0
"""Norm of the error, in times that of Megatron-Core's full head: below the head, most of the error of a gradient is the
rounding of the layers that it came through, 1e-6 of the first layers' with either head. Here 1.4 was the most."""
ROUNDING = 2.0**-24
"""fp32's. An error of this part of a tensor is allowed whatever the full head's is."""
ROWS = pack_examples(random_examples(40), sequence_length=SEQUENCE, pad_id=3)
EMPTY = empty_row(sequence_length=SEQUENCE, pad_id=3)

RIGHT_HEAD = VocabularyHead.forward


def full_head(
    self: VocabularyHead, hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Oracle: Megatron-Core's projection of every position and its cross-entropy."""
    logits, _ = ColumnParallelLinear.forward(self, hidden, weight=weight)
    logits = self._without_padded_words(logits)
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous())
    return losses.t().contiguous()


class ExactLoss(torch.autograd.Function):
    """Oracle: the cross-entropy of [n, h] over all words and its gradients, in float64; rounded to fp32 at the end."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
        own = hidden.double() @ weight[: shard.count].double().t()
        padding = (0, weight.size(0) - shard.count)
        parts = [torch.nn.functional.pad(own, padding, value=-math.inf)]
        if shard.group is not None:
            mine, parts = parts[0], [torch.empty_like(parts[0]) for _ in range(shard.group.size())]
            torch.distributed.all_gather(parts, mine, group=shard.group)
        logits = torch.cat(parts, dim=1)
        log_probabilities = logits.log_softmax(dim=1)
        is_label = torch.arange(logits.size(1)) == labels[:, None]
        mine = slice(shard.first, shard.first + weight.size(0))
        ctx.save_for_backward(hidden, weight, (log_probabilities.exp() - is_label.double())[:, mine])
        ctx.shard = shard
        return -log_probabilities.gather(1, labels[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, of_logits = ctx.saved_tensors
        of_logits = of_logits * gradients[0].double()[:, None]
        of_hidden = of_logits @ weight.double()
        if ctx.shard.group is not None and ctx.shard.reduces_hidden:
            torch.distributed.all_reduce(of_hidden, group=ctx.shard.group)
        return of_hidden.float(), (of_logits.t() @ hidden.double()).float(), None, None


def exact_head(
    self: VocabularyHead, hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Oracle: the full head in float64; the layers below it are those of the others."""
    if self.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
    losses = ExactLoss.apply(hidden.flatten(0, 1), weight, labels.t().flatten(), self.shard)
    return losses.view(hidden.shape[:2]).t().contiguous()


def shifted_head(self: VocabularyHead, hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Fault: the loss of each position's neighbour."""
    return RIGHT_HEAD(self, hidden, weight, labels, (positions + 1) % SEQUENCE)


def inexact_head(self: VocabularyHead, hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Fault: the gradient of hidden is too large by a part in 100,000; the losses are right."""
    if hidden.requires_grad:
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda gradient: gradient * (1.0 + 1e-5))
    return RIGHT_HEAD(self, hidden, weight, labels, positions)


def prompt_only(row: Row) -> Row:
    """Return the row with all its targets taken for inputs."""
    return Row(row.tokens, row.segment_ids, np.zeros_like(row.is_target), row.dataset_ids, row.example_ids)


def micro_batches(dp_rank: int, dp_size: int) -> list[Batch]:
    """Deal micro-batches of one row: with targets, of padding alone, of prompts alone, of text alone.

    Data-parallel ranks have different numbers of positions with a loss, and none at different times.
    """
    text = pack_examples([([], list(range(10, 10 + SEQUENCE + 1)))], sequence_length=SEQUENCE, pad_id=3)[0]
    rows = [ROWS[0], EMPTY, prompt_only(ROWS[1]), ROWS[2], text, ROWS[3], ROWS[4], EMPTY]
    batches = [build_batch([row], normalization="target_token") for row in rows]
    return batches[dp_rank::dp_size]


HEADS = {
    # name: the head, and how many logits it may hold
    "kept": (RIGHT_HEAD, None),
    "chunked": (RIGHT_HEAD, 1500),
    "shifted": (shifted_head, None),
    "inexact": (inexact_head, None),
    "full": (full_head, None),
    "exact": (exact_head, None),
}


def rank_faults(parallel: ParallelConfig, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Run heads in one rank; return of each what of it is too far from the exact head."""
    topology = initialize_parallel(parallel, seed=1)
    engine = build_engine(run_config(**parallel.model_dump()))
    batches = micro_batches(topology.dp_rank, topology.dp_size)
    everything = micro_batches(0, 1)
    at_once = chunked.LOGITS_AT_ONCE["cpu"]
    found = {}
    for name in (*names, "full", "exact"):
        VocabularyHead.forward, limit = HEADS[name]  # type: ignore[method-assign, assignment]
        chunked.LOGITS_AT_ONCE["cpu"] = limit or at_once
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        forward_backward(engine.chunks, batches)
        gradients = {name: gradient.double() for name, gradient in _gradients(engine.chunks).items()}
        losses = run_forward(engine.chunks, everything, lambda batch, losses: losses * (batch.loss_weights > 0))
        found[name] = {**gradients, "losses": torch.cat(losses).double()}
    full, exact = found["full"], found["exact"]
    assert "losses" in exact
    return {name: find_faults(found[name], full, exact) for name in names}


def find_faults(ours: dict[str, Tensor], full: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """Word what breaks a bound."""
    assert ours.keys() == full.keys() == exact.keys()
    faults = []
    for name, wanted in exact.items():
        assert float(wanted.abs().max()) > 0
        error, of_full = (float((side[name] - wanted).norm() / wanted.norm()) for side in (ours, full))
        largest = float((ours[name] - wanted).abs().max() / wanted.abs().max())
        is_near = ".layers." not in name and "embedding.layernorm" not in name
        if error > TWICE * of_full + ROUNDING or (is_near and largest > NEAREST):
            faults.append(f"{name}: error {error:.2e}, of the full head {of_full:.2e}; largest {largest:.2e}")
    return faults


def _gradients(chunks: list[Any]) -> dict[str, Tensor]:
    by_storage = {parameter.data_ptr(): parameter for chunk in chunks for parameter in chunk.parameters()}
    return {name: by_storage[tensor.data_ptr()].main_grad for name, tensor in named_weights(chunks).items()}


@pytest.mark.parametrize("name", ["TP1", "TP2", "TP2-SP", "PP2", "TP2-PP2", "PP2-VPP2", "DP2", "DP2-overlap"])
def test_errs_at_most_twice_as_much_as_the_full_head(name: str) -> None:
    world_size, parallel = (1, ParallelConfig()) if name == "TP1" else layout(name)
    for faults in run_ranks(rank_faults, world_size=world_size, arguments=(parallel, ("kept", "chunked"))):
        assert faults == {"kept": [], "chunked": []}


def test_deliberate_faults_are_seen() -> None:
    (faults,) = run_ranks(rank_faults, world_size=1, arguments=(ParallelConfig(), ("shifted", "inexact")))
    assert any(fault.startswith("losses") for fault in faults["shifted"])
    assert any(fault.startswith("decoder.final_layernorm.bias") for fault in faults["inexact"])
    assert any(".layers.0." in fault for fault in faults["inexact"])
    assert not any(fault.startswith("losses") for fault in faults["inexact"]), "its losses are right"


def test_positions_count_the_labels_with_a_weight_as_hidden_states_lie() -> None:
    batch = build_batch(ROWS[:3], normalization="target_sequence")
    chosen = batch.loss_positions
    assert len(chosen) == batch.num_target_tokens and chosen.dtype == torch.int64
    assert torch.equal(chosen, chosen.sort().values)
    has_weight = torch.zeros(SEQUENCE * 3, dtype=torch.bool).index_fill(0, chosen, True)
    assert torch.equal(has_weight.view(SEQUENCE, 3).t(), batch.loss_weights > 0)
