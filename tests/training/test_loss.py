"""The loss of a step is one weighted mean over the global batch, however that batch is cut."""

from __future__ import annotations

import pytest
import torch

from megatron_xmtf.data.batch import LossNormalization, build_batch
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.training.loss import global_batch_loss, micro_batch_loss

EXAMPLES = [([6, 7], [8, 2]), ([4], [5, 9, 2]), ([3], [2])]


def loss_of(cuts: list[list[int]], normalization: LossNormalization) -> float:
    """Return the step's loss of one row an example; a token's loss is the token itself."""
    rows = [pack_examples([example], sequence_length=7, pad_id=0)[0] for example in EXAMPLES]
    reports = []
    for cut in cuts:
        batch = build_batch([rows[number] for number in cut], normalization=normalization)
        reports.append(micro_batch_loss(batch, batch.labels.float())[2])
    weighted, units = global_batch_loss(reports).tolist()
    return weighted / units


CUTS = [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]]


@pytest.mark.parametrize("cuts", CUTS)
def test_every_target_token_counts_the_same(cuts: list[list[int]]) -> None:
    assert loss_of(cuts, "target_token") == pytest.approx((8 + 2 + 5 + 9 + 2 + 2) / 6)


@pytest.mark.parametrize("cuts", CUTS)
def test_every_target_counts_the_same(cuts: list[list[int]]) -> None:
    assert loss_of(cuts, "target_sequence") == pytest.approx(((8 + 2) / 2 + (5 + 9 + 2) / 3 + 2) / 3)


def test_the_loss_that_bloomz_ran_depends_on_the_cut() -> None:
    first, second, third = (8 + 2) / 2, (5 + 9 + 2) / 3, 2
    assert loss_of(CUTS[0], "target_sequence_per_micro_batch") == pytest.approx((first + second + third) / 3)
    assert loss_of(CUTS[2], "target_sequence_per_micro_batch") == pytest.approx(((third + first) / 2 + second) / 2)


def test_the_gradient_of_each_position_is_its_weight() -> None:
    batch = build_batch(pack_examples(EXAMPLES[:2], sequence_length=8, pad_id=0), normalization="target_sequence")
    losses = torch.ones(batch.labels.shape, requires_grad=True)
    weighted, units, report = micro_batch_loss(batch, losses)
    weighted.backward()
    assert losses.grad is not None and torch.equal(losses.grad, batch.loss_weights)
    # Megatron-Core adds the divisor up as an int tensor over micro-batches and ranks.
    assert (units.dtype, int(units)) == (torch.int, 2)
    assert report.dtype == torch.float64 and not report.requires_grad
    assert report.tolist() == pytest.approx([2.0, 2.0])


def test_half_precision_losses_are_summed_in_fp32() -> None:
    batch = build_batch(pack_examples([([6], [7] * 600)], sequence_length=601, pad_id=0), normalization="target_token")
    losses = torch.ones(batch.labels.shape, dtype=torch.bfloat16)
    assert float(micro_batch_loss(batch, losses)[0]) == 600.0  # bf16 would stop at 256
