import numpy as np
import pytest

from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.loader import BatchLoader, validation_batches
from megatron_xmtf.data.packing import pack_dataset, pack_mixture
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.errors import ConfigError, DatasetError
from tests.data.memory_dataset import random_dataset

LAYOUTS = [(1, 1), (1, 2), (2, 2), (4, 1), (2, 4), (1, 8), (8, 1)]


@pytest.fixture(scope="module")
def rows():
    datasets = [random_dataset("a", 200, seed=1), random_dataset("b", 100, seed=2)]
    return PackedRows(datasets, pack_mixture(datasets, sequence_length=31, rows_needed=64, seed=3), pad_id=0)


def loader(rows, rank=0, *, micro=1, ranks=1, global_batch=8, step_rows=None):
    return BatchLoader(
        rows,
        micro_batch_size=micro,
        step_rows=step_rows or StepRows(global_batch),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        normalization="target_sequence",
    )


def row_numbers(rows, batches):
    """Find which rows of the index a list of micro-batches holds."""
    number_of = {rows[number].tokens.tobytes(): number for number in range(len(rows))}
    return [[number_of[row.tokens.tobytes()] for row in batch.rows] for batch in batches]


def test_the_worked_example(rows):
    ranks = [row_numbers(rows, loader(rows, rank, micro=2, ranks=2).micro_batches(3)) for rank in range(2)]
    assert ranks == [[[24, 25], [28, 29]], [[26, 27], [30, 31]]]


@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
def test_ranks_read_disjoint_rows_and_together_the_same_whatever_the_layout(rows, micro, ranks):
    for step in (0, 5):
        numbers, units, weights = [], 0, 0.0
        for rank in range(ranks):
            batches = loader(rows, rank, micro=micro, ranks=ranks).micro_batches(step)
            assert len(batches) == 8 // (micro * ranks)
            numbers += [number for batch in row_numbers(rows, batches) for number in batch]
            units += sum(batch.num_loss_units for batch in batches)
            weights += sum(batch.loss_weights.double().sum().item() for batch in batches)
        assert sorted(numbers) == list(range(8 * step, 8 * step + 8))
        whole = loader(rows, micro=8).micro_batches(step)[0]
        assert units == whole.num_loss_units == pytest.approx(weights, rel=1e-6)


def test_a_step_is_a_pure_function(rows):
    one, other = loader(rows, micro=2), loader(rows, micro=2)
    other.micro_batches(0)
    for a, b in zip(one.micro_batches(4), other.micro_batches(4), strict=True):
        assert a.tokens.equal(b.tokens) and a.loss_weights.equal(b.loss_weights)


RAMP = StepRows(16, 4, 4, 24)
"""Increments after 8, 16 and 24 rows: steps of 4, 4, 8, 12, 16, 16 ... rows."""


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_a_ramp_reads_the_same_rows_in_the_same_order_whatever_the_layout(rows, micro, ranks):
    for step, (begin, end) in enumerate([(0, 4), (4, 8), (8, 16), (16, 28), (28, 44), (44, 60)]):
        dealt = [
            row_numbers(rows, loader(rows, rank, micro=micro, ranks=ranks, step_rows=RAMP).micro_batches(step))
            for rank in range(ranks)
        ]
        # Micro-batch m of rank r comes after the same one of rank r - 1 and before all others.
        in_order = [number for places in zip(*dealt, strict=True) for batch in places for number in batch]
        assert in_order == list(range(begin, end))


@pytest.mark.parametrize(
    ("step_rows", "hint"),
    [
        (StepRows(16, 6, 10, 8), r"rampup_batch_size.start=6 is not a multiple .* = 2 x 2; use 4 or 8"),
        (StepRows(16, 4, 6, 8), r"rampup_batch_size.increment=6 is not a multiple .* = 2 x 2; use 4 or 8"),
    ],
)
def test_every_size_of_a_ramp_must_be_dealt_evenly(rows, step_rows, hint):
    with pytest.raises(ConfigError, match=hint):
        loader(rows, micro=2, ranks=2, step_rows=step_rows)


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "hint"),
    [(510, 1, 16, "1 x 16; use 496 or 512"), (3, 2, 4, "2 x 4; use 8.")],
)
def test_a_global_batch_that_cannot_be_dealt_names_the_nearest(rows, global_batch, micro, ranks, hint):
    with pytest.raises(ConfigError, match=hint):
        loader(rows, micro=micro, ranks=ranks, global_batch=global_batch)


def test_a_step_beyond_the_index_is_an_error(rows):
    last = len(rows) // 8 - 1
    loader(rows).micro_batches(last)
    with pytest.raises(DatasetError, match="xmtf pack CONFIG"):
        loader(rows).micro_batches(last + 1)


@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
@pytest.mark.parametrize("num_rows", [3, 10, 1000])
def test_validation_measures_each_row_once_whatever_the_layout(micro, ranks, num_rows):
    dataset = random_dataset("a", 80, seed=1)
    rows = PackedRows([dataset], pack_dataset(dataset, sequence_length=31), pad_id=0)
    shares = [
        validation_batches(
            rows,
            num_rows=num_rows,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            normalization="target_sequence",
        )
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in shares}) == 1
    read = [row for batches in shares for batch in batches for row in batch.rows]
    assert all(len(batch.rows) == micro for batches in shares for batch in batches)
    measured = np.concatenate([row.example_ids for row in read])
    expected = rows.index.example_ids[: rows.index.row_offsets[min(num_rows, len(rows))]]
    assert sorted(measured.tolist()) == expected.tolist()
    assert sum(b.num_loss_units for batches in shares for b in batches) == len(expected)
