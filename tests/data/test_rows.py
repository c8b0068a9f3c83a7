import numpy as np
import pytest

from megatron_xmtf.data.packing import pack_dataset, pack_mixture
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.rows import PackedRows, empty_row, pack_examples
from megatron_xmtf.errors import DatasetError
from tests.data.memory_dataset import MemoryDataset, dataset_of_lengths, random_dataset

PAIRS = [([6, 7], [8, 2]), ([4], [5, 2])]


def test_the_worked_example():
    row = PackedRows([dataset := MemoryDataset("a", PAIRS)], pack_dataset(dataset, sequence_length=7), pad_id=0)[0]
    assert row.tokens.tolist() == [6, 7, 8, 2, 4, 5, 2, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert row.is_target.astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1, 0]
    assert row.example_ids.tolist() == [0, 1] and row.dataset_ids.tolist() == [0, 0]
    assert row.tokens.dtype == np.int32 and row.segment_ids.dtype == np.int32


def test_rows_hold_the_examples_they_name():
    datasets = [
        random_dataset("a", 60, seed=1),
        random_dataset("b", 40, seed=2, first_token=50_000),
        dataset_of_lengths("text", [(0, 5), (0, 1), (0, 17)], first_token=90_000),
    ]
    rows = PackedRows(datasets, pack_mixture(datasets, sequence_length=31, seed=5), pad_id=0)
    seen = []
    for row in (rows[number] for number in range(len(rows))):
        assert len(row.tokens) == 32
        for segment, (dataset, example) in enumerate(zip(row.dataset_ids, row.example_ids, strict=True), start=1):
            inputs, targets = datasets[dataset][example]
            inside = row.segment_ids == segment
            assert row.tokens[inside & ~row.is_target].tolist() == inputs.tolist()
            assert row.tokens[inside & row.is_target].tolist() == targets.tolist()
            seen.append((int(dataset), int(example)))
        assert not row.is_target[row.segment_ids == 0].any()
    assert len(seen) == len(set(seen)) == 103


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("truncate_inputs_left", [13, 14, 15, 16, 17, 18]), ("truncate_inputs_right", [10, 11, 12, 13, 14, 15])],
)
def test_truncation_keeps_the_target_whole(policy, kept):
    dataset = dataset_of_lengths("a", [(9, 2)])
    index = pack_mixture([dataset], sequence_length=7, long_examples=policy)
    row = PackedRows([dataset], index, pad_id=0)[0]
    assert row.tokens.tolist() == [*kept, 19, 20]
    assert row.is_target.astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert index.statistics["tokens"] == 8


def test_an_index_of_other_data_is_refused():
    dataset = random_dataset("a", 20, seed=1)
    index = pack_mixture([dataset], sequence_length=31)
    with pytest.raises(DatasetError, match="example 19 of dataset 'a', which has 10"):
        PackedRows([random_dataset("a", 10, seed=1)], index, pad_id=0)
    with pytest.raises(DatasetError, match="built from 1 datasets"):
        PackedRows([dataset, dataset], index, pad_id=0)
    rows = PackedRows([dataset_of_lengths("a", [(30, 2)] * 20)], index, pad_id=0)
    with pytest.raises(DatasetError, match="the data are not those that were packed"):
        rows[0]
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize(("ids", "dataset"), [([0, 3], 0), ([0, 1], 1)])
def test_an_index_altered_after_its_verification_is_an_error_of_the_data(ids, dataset):
    index = PackingIndex(
        row_offsets=np.array([0, 1, 2]),
        dataset_ids=np.array([0, dataset], np.uint16),
        example_ids=np.array(ids, np.uint32),
        row_lengths=7,
        long_examples="drop",
        statistics={"rows": 2, "datasets": [{"name": "a"}]},
        key="",
        key_inputs={},
        required_examples=[1],
    )
    rows = PackedRows([MemoryDataset("a", PAIRS)], index, pad_id=0)
    assert rows[0].example_ids.tolist() == [0]
    with pytest.raises(DatasetError, match="row 1 of the packing index names an example that there is not"):
        rows[1]


def test_examples_are_packed_in_memory():
    examples = [([1] * (i % 5), [i] * (1 + i % 3)) for i in range(1, 40)]
    rows = pack_examples(examples, sequence_length=15, pad_id=0, seed=2)
    places = np.concatenate([row.example_ids for row in rows])
    assert sorted(places.tolist()) == list(range(39))
    for row in rows:
        for segment, number in enumerate(row.example_ids, start=1):
            inside = row.segment_ids == segment
            assert row.tokens[inside].tolist() == [*examples[number][0], *examples[number][1]]
            assert row.is_target[inside].sum() == len(examples[number][1])
    assert pack_examples([], sequence_length=15, pad_id=0) == []


@pytest.mark.parametrize("example", [([1] * 10, [2] * 7), ([1, 2], [])])
def test_an_example_that_no_row_can_hold_is_named(example):
    with pytest.raises(DatasetError, match="example 1 has"):
        pack_examples([([1], [2]), example], sequence_length=15, pad_id=0)


def test_an_empty_row_is_padding_alone():
    row = empty_row(sequence_length=7, pad_id=3)
    assert row.tokens.tolist() == [3] * 8 and not row.segment_ids.any() and len(row.example_ids) == 0
