"""Rows are shown with the weights that training gives them, also where those depend on the whole step."""

from __future__ import annotations

import pytest

from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.data.packing import pack_mixture
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.report.shown_rows import show_row
from tests.data.memory_dataset import random_dataset


@pytest.mark.parametrize("step_rows", [StepRows(8), StepRows(8, 2, 2, 12)], ids=["constant", "ramp"])
def test_weights_of_datasets_are_those_of_the_row_s_own_step(step_rows: StepRows) -> None:
    datasets = [random_dataset("a", 60, seed=1), random_dataset("b", 20, seed=2)]
    index = pack_mixture(datasets, sequence_length=31, rows_needed=22, seed=3)
    rows = PackedRows(datasets, index, pad_id=0)
    loader = BatchLoader(
        rows,
        micro_batch_size=1,
        step_rows=step_rows,
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization="dataset",
    )
    trained = [batch for step in range(step_rows.step_of(22)) for batch in loader.micro_batches(step)]
    assert len(trained) >= 16
    for number, batch in enumerate(trained):
        shown = show_row(rows, number, tokenizer=None, normalization="dataset", micro_batch_size=1, step_rows=step_rows)
        weights = [weight for segment in shown["segments"] for weight in segment["loss_weights"] if weight]
        assert weights == [weight for weight in batch.loss_weights[0].tolist() if weight], f"row {number}"
