"""The loss of a step is one weighted mean over the global batch, however that batch is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.batch import LossNormalization, build_batch
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.data.packing import pack_mixture
from megatron_xmtf.data.rows import PackedRows, Row, pack_examples
from megatron_xmtf.training.group_step_adam import GroupStepAdam
from megatron_xmtf.training.loss import global_batch_loss, micro_batch_loss
from tests.data.memory_dataset import random_dataset

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


DATASETS = [0, 1, 1]
"""Dataset of each of EXAMPLES: 2 target tokens of the first, 3 + 1 of the second."""


def dataset_loss_of(cuts: list[list[int]], counts: list[int]) -> float:
    """As `loss_of`, for `dataset`; counts: target tokens of the global batch by dataset."""
    rows = [pack_examples([example], sequence_length=7, pad_id=0)[0] for example in EXAMPLES]
    rows = [
        Row(row.tokens, row.segment_ids, row.is_target, np.array([dataset], np.uint16), row.example_ids)
        for row, dataset in zip(rows, DATASETS, strict=True)
    ]
    reports = []
    for cut in cuts:
        batch = build_batch(
            [rows[number] for number in cut], normalization="dataset", dataset_target_tokens=np.array(counts)
        )
        reports.append(micro_batch_loss(batch, batch.labels.float())[2])
    weighted, units = global_batch_loss(reports).tolist()
    return weighted / units


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("counts", [[2, 4], [2, 4, 0]])  # a third dataset that is absent weighs nothing
def test_every_dataset_counts_the_same(cuts: list[list[int]], counts: list[int]) -> None:
    assert dataset_loss_of(cuts, counts) == pytest.approx(((8 + 2) / 2 + (5 + 9 + 2 + 2) / 4) / 2)


def test_counts_that_are_not_of_the_global_batch_are_an_error() -> None:
    with pytest.raises(AssertionError, match="its global batch"):
        dataset_loss_of([[0, 1, 2]], [2, 3])
    with pytest.raises(AssertionError, match="`dataset` alone"):
        build_batch(pack_examples(EXAMPLES, sequence_length=8, pad_id=0), normalization="dataset")


@pytest.mark.parametrize("normalization", ["target_token", "target_sequence", "dataset"])
def test_a_step_is_the_same_for_any_micro_batch_and_data_parallel_size(normalization: LossNormalization) -> None:
    datasets = [random_dataset("a", 200, seed=1), random_dataset("b", 60, seed=2), random_dataset("c", 20, seed=3)]
    index = pack_mixture(datasets, sequence_length=31, rows_needed=32, seed=3)
    rows = PackedRows(datasets, index, pad_id=0)

    def step_losses(micro: int, ranks: int) -> list[float]:
        losses = []
        for step in range(4):
            reports = []
            for rank in range(ranks):
                loader = BatchLoader(
                    rows,
                    micro_batch_size=micro,
                    step_rows=StepRows(8),
                    data_parallel_rank=rank,
                    data_parallel_size=ranks,
                    normalization=normalization,
                )
                batches = loader.micro_batches(step)
                reports += [micro_batch_loss(batch, (batch.labels % 7).float())[2] for batch in batches]
            weighted, units = global_batch_loss(reports).tolist()
            losses.append(weighted / units)
        return losses

    reference = step_losses(8, 1)
    for micro, ranks in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]:
        assert step_losses(micro, ranks) == pytest.approx(reference, rel=1e-6)
    if normalization == "dataset":  # by hand, a token at a time
        for step, loss in enumerate(reference):
            found: dict[int, list[int]] = {}
            for row in (rows[number] for number in range(8 * step, 8 * step + 8)):
                for place in range(1, len(row.tokens)):
                    segment = int(row.segment_ids[place])
                    if segment and segment == row.segment_ids[place - 1] and row.is_target[place]:
                        found.setdefault(int(row.dataset_ids[segment - 1]), []).append(int(row.tokens[place]) % 7)
            assert loss == pytest.approx(np.mean([np.mean(tokens) for tokens in found.values()]), rel=1e-6)


class NumbersOfPython(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers; on a GPU each is a copy that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_neither_a_micro_batch_s_loss_nor_an_update_waits_for_the_device() -> None:
    rows = [pack_examples([example], sequence_length=7, pad_id=0)[0] for example in EXAMPLES]
    batch = build_batch(rows, normalization="target_token")
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer = GroupStepAdam(parameters)
    with NumbersOfPython() as seen:
        micro_batch_loss(batch, batch.labels.float())
        optimizer.step()
    assert seen.count == 0
    with NumbersOfPython() as seen:
        torch.tensor(1.0)
    assert seen.count == 1, "a number of Python is seen"
