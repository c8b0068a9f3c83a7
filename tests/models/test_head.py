"""The head computed where a loss is equals the full head of Megatron-Core: losses and all gradients, every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, empty_row, pack_examples
from megatron_xmtf.kernels.head_loss import chunked
from megatron_xmtf.models.forward import run_forward
from megatron_xmtf.models.head import VocabularyHead
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.layouts import layout
from tests.parallel.tiny_engine import SEQUENCE, build_engine, forward_backward, named_weights, run_config
from tests.tiny import random_examples

TOLERANCE = 2e-6
"""16 times fp32's rounding. The two heads add up in another order, and how much that shows depends on the processor's
matrix product: 1e-6 held on an AMD EPYC, 1.04e-6 was seen on an Intel Xeon."""
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


def shifted_head(self: VocabularyHead, hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Fault: the loss of each position's neighbour."""
    return RIGHT_HEAD(self, hidden, weight, labels, (positions + 1) % SEQUENCE)


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


def rank_differences(parallel: ParallelConfig, logits_at_once: int | None, fault: str) -> dict[str, float]:
    """Compare both heads in one rank; return max|difference| / max|full| of each gradient, and of the losses."""
    topology = initialize_parallel(parallel, seed=1)
    if logits_at_once is not None:
        chunked.LOGITS_AT_ONCE["cpu"] = logits_at_once
    engine = build_engine(run_config(**parallel.model_dump()))
    batches = micro_batches(topology.dp_rank, topology.dp_size)
    everything = micro_batches(0, 1)
    ours = shifted_head if fault == "shifted positions" else RIGHT_HEAD
    found = []
    for forward in (ours, full_head):
        VocabularyHead.forward = forward  # type: ignore[method-assign, assignment]
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        forward_backward(engine.chunks, batches)
        gradients = {name: gradient.clone() for name, gradient in _gradients(engine.chunks).items()}
        losses = run_forward(engine.chunks, everything, lambda batch, losses: losses * (batch.loss_weights > 0))
        found.append({**gradients, "losses": torch.cat(losses)})
    skipping, full = found
    assert skipping.keys() == full.keys()
    return {name: _difference(skipping[name], full[name]) for name in full}


def _gradients(chunks: list[Any]) -> dict[str, Tensor]:
    by_storage = {parameter.data_ptr(): parameter for chunk in chunks for parameter in chunk.parameters()}
    return {name: by_storage[tensor.data_ptr()].main_grad for name, tensor in named_weights(chunks).items()}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    assert float(theirs.abs().max()) > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("logits_at_once", [None, 1500], ids=["kept", "chunked"])
@pytest.mark.parametrize("name", ["TP1", "TP2", "TP2-SP", "PP2", "TP2-PP2", "PP2-VPP2", "DP2", "DP2-overlap"])
def test_equals_the_full_head(name: str, logits_at_once: int | None) -> None:
    world_size, parallel = (1, ParallelConfig()) if name == "TP1" else layout(name)
    for differences in run_ranks(rank_differences, world_size=world_size, arguments=(parallel, logits_at_once, "")):
        tensor, difference = max(differences.items(), key=lambda item: item[1])
        assert "losses" in differences and difference <= TOLERANCE, f"{tensor}: {difference:.2e}"


def test_losses_of_other_positions_are_seen() -> None:
    arguments = (ParallelConfig(), None, "shifted positions")
    differences = run_ranks(rank_differences, world_size=1, arguments=arguments)[0]
    assert differences["losses"] > 1e3 * TOLERANCE


def test_positions_count_the_labels_with_a_weight_as_hidden_states_lie() -> None:
    batch = build_batch(ROWS[:3], normalization="target_sequence")
    chosen = batch.loss_positions
    assert len(chosen) == batch.num_target_tokens and chosen.dtype == torch.int64
    assert torch.equal(chosen, chosen.sort().values)
    has_weight = torch.zeros(SEQUENCE * 3, dtype=torch.bool).index_fill(0, chosen, True)
    assert torch.equal(has_weight.view(SEQUENCE, 3).t(), batch.loss_weights > 0)
