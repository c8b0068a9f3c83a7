"""Tensors of two sides: values by hand, `transformers`' own shift, and what may see what."""

import numpy as np
import pytest
import torch

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.data.encoder_decoder_batch import build_encoder_decoder_batch
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow, EncoderDecoderRows, pack_examples_two_sided
from megatron_xmtf.data.loader import BatchLoader, validation_batches
from megatron_xmtf.data.packing import pack_dataset, pack_mixture
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.errors import DatasetError
from tests.data.memory_dataset import MemoryDataset, dataset_of_lengths

LENGTHS = EncoderDecoderLengths(8, 6)
EOS, START = 1, 0


def ints(*values):
    return np.array(values, np.int32)


def by_hand(start=START):
    return EncoderDecoderRow(
        encoder_tokens=ints(6, 7, 1, 4, 1, 0, 0, 0),
        encoder_segment_ids=ints(1, 1, 1, 2, 2, 0, 0, 0),
        targets=ints(8, 9, 1, 5, 1, 0),
        decoder_segment_ids=ints(1, 1, 1, 2, 2, 0),
        decoder_start_id=start,
        dataset_ids=np.array([0, 1], np.uint16),
        example_ids=np.array([0, 1]),
    )


def rows_of(datasets, index, start=START):
    return EncoderDecoderRows(datasets, index, pad_id=0, eos_id=EOS, decoder_start_id=start)


def random_pairs(count, seed=0, inputs=12, targets=5):
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(10, 99, random.integers(1, inputs)),
            [*random.integers(10, 99, random.integers(0, targets)), EOS],
        )
        for _ in range(count)
    ]


def test_the_worked_example():
    dataset = MemoryDataset("a", [([6, 7], [8, 9, 1]), ([4], [5, 1])])
    row = rows_of([dataset], pack_dataset(dataset, sequence_length=LENGTHS))[0]
    expected = by_hand()
    for name in ("encoder_tokens", "encoder_segment_ids", "targets", "decoder_segment_ids"):
        np.testing.assert_array_equal(getattr(row, name), getattr(expected, name))
    batch = build_encoder_decoder_batch([row], normalization="target_sequence")
    assert batch.encoder_position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.decoder_tokens.tolist() == [[0, 8, 9, 0, 5, 0]]
    assert batch.decoder_position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.labels.tolist() == [[8, 9, 1, 5, 1, 0]]
    torch.testing.assert_close(batch.loss_weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0]]))
    assert batch.loss_positions.tolist() == [0, 1, 2, 3, 4]
    assert (batch.num_loss_units, batch.num_examples, batch.num_tokens, batch.num_target_tokens) == (2, 2, 10, 5)
    assert batch.pipeline_length == 14


@pytest.mark.parametrize(
    ("normalization", "weights", "units"),
    [
        ("target_token", [1, 1, 1, 1, 1, 0], 5),
        ("target_sequence", [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0], 2),
        ("target_sequence_per_micro_batch", [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4, 0], 1),
        # T = 9 of the global batch, 6 of dataset 0 and 3 of dataset 1: 9 / (6 * 2) and 9 / (3 * 2).
        ("dataset", [3 / 4, 3 / 4, 3 / 4, 3 / 2, 3 / 2, 0], 5),
    ],
)
def test_normalisations_by_hand(normalization, weights, units):
    counts = np.array([6, 3]) if normalization == "dataset" else None
    batch = build_encoder_decoder_batch([by_hand()], normalization=normalization, dataset_target_tokens=counts)
    torch.testing.assert_close(batch.loss_weights, torch.tensor([weights], dtype=torch.float32))
    assert batch.num_loss_units == units


def test_positions_are_counted_across_rows():
    batch = build_encoder_decoder_batch([by_hand(), by_hand(start=3)], normalization="target_token")
    assert batch.loss_positions.tolist() == list(range(10))
    assert batch.decoder_tokens[1].tolist() == [3, 8, 9, 3, 5, 0]


def test_decoder_inputs_are_those_of_transformers():
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=99, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1, decoder_start_token_id=7, pad_token_id=0
    )
    model = MT5ForConditionalGeneration(config)
    pairs = random_pairs(30)
    rows = pack_examples_two_sided(
        pairs, lengths=EncoderDecoderLengths(32, 12), pad_id=0, eos_id=EOS, decoder_start_id=7, seed=1
    )
    batch = build_encoder_decoder_batch(rows, normalization="target_token")
    seen = []
    for number, row in enumerate(rows):
        for place, example in enumerate(row.example_ids.tolist(), start=1):
            inputs, targets = pairs[example]
            own = batch.decoder_segment_ids[number] == place
            assert batch.labels[number][own].tolist() == list(targets)
            shifted = model._shift_right(torch.tensor([targets], dtype=torch.int64))
            assert batch.decoder_tokens[number][own].tolist() == shifted[0].tolist()
            of_encoder = batch.encoder_segment_ids[number] == place
            assert batch.encoder_tokens[number][of_encoder].tolist() == [*inputs, EOS]
            assert batch.encoder_position_ids[number][of_encoder].tolist() == list(range(len(inputs) + 1))
            seen.append(example)
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("truncate_inputs_left", [12, 13, 14, 15, 16, 17, 18]), ("truncate_inputs_right", [*range(10, 17)])],
)
def test_truncation_keeps_targets_and_eos(policy, kept):
    dataset = MemoryDataset("a", [(range(10, 19), [8, 1]), ([4], [5] * 7), ([3] * 7, [2] * 6)])
    index = pack_dataset(dataset, sequence_length=LENGTHS, long_examples=policy)
    (entry,) = index.statistics["datasets"]
    assert (entry["dropped"], entry["truncated"], entry["examples"]) == (1, 1, 2)
    rows = rows_of([dataset], index)
    assert rows[0].encoder_tokens.tolist() == [*kept, EOS]
    assert rows[0].targets.tolist() == [8, 1, 0, 0, 0, 0]
    assert rows[1].encoder_tokens.tolist() == [3] * 7 + [EOS] and rows[1].targets.tolist() == [2] * 6


def test_drop_and_error_look_at_both_sides():
    dataset = MemoryDataset("a", [([3] * 8, [2]), ([3], [2] * 7), ([3] * 7, [2] * 6)])
    (entry,) = pack_dataset(dataset, sequence_length=LENGTHS).statistics["datasets"]
    assert (entry["dropped"], entry["truncated"], entry["examples"]) == (2, 0, 1)
    with pytest.raises(DatasetError, match="encoder_length or decoder_length"):
        pack_dataset(dataset, sequence_length=LENGTHS, long_examples="error")
    without_eos = pack_dataset(dataset, sequence_length=EncoderDecoderLengths(8, 6, encoder_eos=False))
    assert without_eos.statistics["examples"] == 2


def test_texts_need_an_objective():
    with pytest.raises(DatasetError, match="objective"):
        pack_mixture([MemoryDataset("a", [([], [3, 4])])], sequence_length=LENGTHS)


def test_statistics_counts_and_loader_agree_with_the_tensors():
    lengths = EncoderDecoderLengths(16, 10)
    datasets = [MemoryDataset(name, random_pairs(60, seed)) for seed, name in enumerate("ab")]
    index = pack_mixture(datasets, sequence_length=lengths, seed=3)
    rows, statistics = rows_of(datasets, index), index.statistics
    loader = BatchLoader(
        rows,
        micro_batch_size=1,
        step_rows=StepRows(4),
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization="dataset",
    )
    batches = loader.micro_batches(0)
    counts = np.zeros(2, np.int64)
    for batch in batches:
        for place, dataset in enumerate(batch.rows[0].dataset_ids.tolist(), start=1):
            counts[dataset] += int((batch.decoder_segment_ids == place).sum())
    np.testing.assert_array_equal(counts, count_target_tokens(rows, 0, count=4))
    total = sum(float(batch.loss_weights.sum()) for batch in batches)
    assert total == pytest.approx(counts.sum(), rel=1e-5)

    everything = validation_batches(
        rows,
        num_rows=len(rows),
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization="target_sequence",
    )
    targets = sum(batch.num_target_tokens for batch in everything)
    inputs = sum(batch.num_tokens for batch in everything) - targets
    assert statistics["examples"] == sum(batch.num_examples for batch in everything) == 120
    assert (statistics["target_tokens"], statistics["tokens"]) == (targets, inputs + targets)
    assert statistics["encoder_fill_fraction"] == pytest.approx(inputs / (len(rows) * 16))
    assert statistics["decoder_fill_fraction"] == pytest.approx(targets / (len(rows) * 10))
    assert statistics["fewest_rows"] <= len(rows)


def test_the_index_is_keyed_stored_and_opened(tmp_path):
    from megatron_xmtf.data.packing_index import PackingIndex

    dataset = dataset_of_lengths("a", [(5, 3)] * 20)
    keys = {
        pack_mixture([dataset], sequence_length=lengths).key
        for lengths in (
            EncoderDecoderLengths(16, 8),
            EncoderDecoderLengths(18, 8),
            EncoderDecoderLengths(16, 10),
            EncoderDecoderLengths(16, 8, encoder_eos=False),
            24,
        )
    }
    assert len(keys) == 5
    index = pack_mixture([dataset], sequence_length=EncoderDecoderLengths(16, 8))
    index.save(tmp_path / "index")
    loaded = PackingIndex.load(tmp_path / "index", key=index.key)
    assert loaded.row_lengths == index.row_lengths and loaded.capacity == 24
    np.testing.assert_array_equal(loaded.example_ids, index.example_ids)


def test_an_index_of_other_data_is_refused():
    index = pack_mixture([dataset_of_lengths("a", [(5, 3)] * 20)], sequence_length=EncoderDecoderLengths(16, 8))
    rows = rows_of([dataset_of_lengths("a", [(5, 9)] * 20)], index)
    with pytest.raises(DatasetError, match="decoder_length"):
        rows[0]
