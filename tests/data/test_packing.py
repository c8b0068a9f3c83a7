import numpy as np
import pytest

from megatron_xmtf.config import DataConfig, MixtureConfig
from megatron_xmtf.data.packing import (
    build_packing_index,
    index_path,
    open_packing_index,
    pack_dataset,
    pack_mixture,
    packing_key,
)
from megatron_xmtf.errors import DatasetError
from tests.data.memory_dataset import MemoryDataset, dataset_of_lengths, random_dataset


def config(names, **fields):
    return DataConfig.model_validate({"train": [{"prefix": name} for name in names], **fields})


def weighted(**weights):
    return MixtureConfig(entries=[{"prefix": name, "weight": weight} for name, weight in weights.items()])


def segments_of(index):
    return list(zip(index.dataset_ids.tolist(), index.example_ids.tolist(), strict=True))


def test_each_epoch_has_every_example_once_and_is_packed_by_itself():
    datasets = [random_dataset("a", 30, seed=1), random_dataset("b", 50, seed=2)]
    index = pack_mixture(datasets, sequence_length=31, rows_needed=100, seed=7)
    epochs = index.statistics["epochs"]
    assert epochs > 2 and len(index) == 100 == index.statistics["rows"]
    assert 80 * (epochs - 1) < len(index.example_ids) <= 80 * epochs
    everything = sorted([(0, i) for i in range(30)] + [(1, i) for i in range(50)])
    orders = []
    for epoch in range(epochs - 1):
        segments = segments_of(index)[80 * epoch : 80 * (epoch + 1)]
        assert sorted(segments) == everything
        assert 80 * (epoch + 1) in index.row_offsets
        orders.append(segments)
    assert orders[0] != orders[1]
    last = segments_of(index)[80 * (epochs - 1) :]
    assert len(set(last)) == len(last)


def test_a_longer_run_begins_with_the_rows_of_a_shorter_one():
    datasets = [random_dataset("a", 40, seed=1)]
    short = pack_mixture(datasets, sequence_length=31, rows_needed=10, seed=7)
    long = pack_mixture(datasets, sequence_length=31, rows_needed=90, seed=7)
    assert len(long) > len(short)
    assert np.array_equal(long.row_offsets[: len(short) + 1], short.row_offsets)
    assert segments_of(long)[: len(short.example_ids)] == segments_of(short)


def test_weights_decide_the_shares_and_repeats_are_counted():
    datasets = [random_dataset("a", 90, seed=1), random_dataset("b", 10, seed=2)]
    index = pack_mixture(datasets, mixture=weighted(a=1, b=3), sequence_length=31, seed=7)
    assert np.bincount(index.dataset_ids).tolist() == [25, 75]
    a, b = index.statistics["datasets"]
    assert (a["examples"], a["repeats"], b["examples"], b["repeats"]) == (25, 0, 75, 65)
    assert b["epochs"] == 7.5 and index.statistics["repeats"] == 65
    assert [(part["name"], part["wanted_share"], part["share"]) for part in index.statistics["components"]] == [
        ("a", 0.25, 0.25),
        ("b", 0.75, 0.75),
    ]


def test_statistics_against_a_count_by_hand():
    datasets = [dataset_of_lengths("a", [(3, 2), (9, 2), (2, 1), (1, 9)]), dataset_of_lengths("t", [(0, 5), (0, 1)])]
    statistics = pack_mixture(datasets, sequence_length=7, seed=0).statistics
    # Fitting 8 tokens: 3+2, 2+1, text 5, text 1; the first token of a text is not predicted.
    assert statistics["examples"] == 4 and statistics["tokens"] == 5 + 3 + 5 + 1
    assert statistics["target_tokens"] == 2 + 1 + 4 + 0
    assert statistics["rows"] == 2 and statistics["fill_fraction"] == 14 / 16
    assert (statistics["dropped"], statistics["truncated"], statistics["empty"]) == (2, 0, 0)
    assert [entry["name"] for entry in statistics["datasets"]] == ["a", "t"]


@pytest.mark.parametrize(
    ("policy", "kept", "dropped", "truncated"),
    [("drop", [0], 3, 0), ("truncate_inputs_left", [0, 1], 2, 1), ("truncate_inputs_right", [0, 1], 2, 1)],
)
def test_policies_for_long_examples(policy, kept, dropped, truncated):
    # A row holds 8 tokens. Example 2 has no room for a token of its inputs, example 3 is a target longer than a row.
    dataset = dataset_of_lengths("a", [(3, 2), (9, 2), (4, 8), (1, 12)])
    statistics = (index := pack_mixture([dataset], sequence_length=7, long_examples=policy)).statistics
    assert sorted(index.example_ids.tolist()) == kept
    assert (statistics["dropped"], statistics["truncated"]) == (dropped, truncated)


def test_error_policy_names_the_example():
    dataset = dataset_of_lengths("swahili", [(3, 2), (9, 2), (4, 8)])
    with pytest.raises(DatasetError, match=r"'swahili'.*example 1 has 9 \+ 2 = 11 tokens, a row holds 8 .*2 of 3"):
        pack_mixture([dataset], sequence_length=7, long_examples="error")


def test_an_example_without_target_is_left_out_and_counted():
    statistics = pack_mixture([dataset_of_lengths("a", [(3, 0), (3, 2)])], sequence_length=7).statistics
    assert (statistics["examples"], statistics["empty"], statistics["dropped"]) == (1, 1, 0)


@pytest.mark.parametrize("lengths", [[], [(20, 3)], [(2, 0)]])
def test_a_mixture_that_could_never_fill_a_row_is_an_error(lengths):
    datasets = [dataset_of_lengths("a", lengths), dataset_of_lengths("b", [(1, 30)])]
    with pytest.raises(DatasetError, match="none of the .* fits a row of 8 tokens"):
        pack_mixture(datasets, sequence_length=7, rows_needed=10)
    with pytest.raises(DatasetError, match="dataset 'b'.*1 too long"):
        pack_mixture(datasets[1:], sequence_length=7, rows_needed=10)


def test_a_weighted_dataset_with_nothing_to_give_is_an_error():
    datasets = [dataset_of_lengths("a", [(3, 2)]), dataset_of_lengths("b", [(1, 30)])]
    assert pack_mixture(datasets, sequence_length=7).statistics["dropped"] == 1
    with pytest.raises(DatasetError, match="dataset 'b'"):
        pack_mixture(datasets, mixture=weighted(a=1, b=1), sequence_length=7)


def test_build_stores_and_open_finds(tmp_path):
    datasets = [random_dataset("a", 40, seed=1), random_dataset("b", 20, seed=2)]
    arguments = dict(data=config("ab"), sequence_length=31, rows_needed=20, seed=3, directory=tmp_path)
    with pytest.raises(DatasetError, match="xmtf pack CONFIG"):
        open_packing_index(datasets, **arguments)
    built = build_packing_index(datasets, **arguments)
    opened = open_packing_index(datasets, **arguments)
    assert isinstance(opened.example_ids, np.memmap)
    assert segments_of(built) == segments_of(opened) and built.statistics == opened.statistics
    assert [path.name for path in tmp_path.iterdir()] == [built.key[:16]]
    with pytest.raises(DatasetError, match="seed=4"):
        open_packing_index(datasets, **{**arguments, "seed": 4})


def test_same_arguments_same_bytes(tmp_path):
    datasets = [random_dataset("a", 40, seed=1)]
    files = []
    for place in ("one", "two"):
        index = build_packing_index(
            datasets, data=config("a"), sequence_length=31, rows_needed=20, seed=3, directory=tmp_path / place
        )
        files.append({p.name: p.read_bytes() for p in index_path(tmp_path / place, index.key).iterdir()})
    assert files[0] == files[1] and len(files[0]) == 4


def test_the_key_changes_with_everything_that_changes_the_rows():
    same = dict(
        mixture=weighted(a=None), split_seed=0, sequence_length=31, long_examples="drop", seed=3, rows_needed=20
    )
    datasets = [random_dataset("a", 40, seed=1)]
    key = packing_key(datasets, **same)[0]
    assert key == packing_key([random_dataset("a", 40, seed=1, first_token=99)], **same)[0]
    others = [
        packing_key(datasets, **{**same, field: value})[0]
        for field, value in [
            ("mixture", weighted(a=2.0)),
            ("split_seed", 1),
            ("sequence_length", 30),
            ("long_examples", "truncate_inputs_left"),
            ("seed", 4),
            ("rows_needed", 21),
        ]
    ]
    others.append(packing_key([random_dataset("a", 40, seed=2)], **same)[0])
    for content in ("x", "y"):
        datasets[0].manifest = {"sha256": content}
        others.append(packing_key(datasets, **same)[0])
    assert len({key, *others}) == len(others) + 1


def test_validation_keeps_the_order_of_the_file():
    dataset = dataset_of_lengths("a", [(3, 2), (1, 1), (9, 2), (2, 2), (2, 3), (3, 0), (1, 7)])
    index = pack_dataset(dataset, sequence_length=7)
    assert index.example_ids.tolist() == [0, 1, 3, 4, 6]
    assert index.row_offsets.tolist() == [0, 2, 3, 4, 5]
    assert (index.statistics["dropped"], index.statistics["empty"]) == (1, 1)
    two = pack_dataset(dataset, sequence_length=7, rows=2)
    assert two.example_ids.tolist() == [0, 1, 3] and two.statistics["rows"] == 2
    assert two.statistics["tokens"] == 5 + 2 + 4
    with pytest.raises(DatasetError, match="no example for a row"):
        pack_dataset(MemoryDataset("e", []), sequence_length=7)
