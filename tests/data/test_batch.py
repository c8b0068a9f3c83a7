from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_xmtf.data.batch import build_batch, move
from megatron_xmtf.data.packing import pack_dataset
from megatron_xmtf.data.rows import PackedRows, empty_row, pack_examples
from tests.data.memory_dataset import MemoryDataset

NORMALIZATIONS = ["target_token", "target_sequence", "target_sequence_per_micro_batch"]


def rows_in_order(examples, sequence_length=7, pad_id=0):
    """Pack examples in their own order."""
    dataset = MemoryDataset("a", examples)
    rows = PackedRows([dataset], pack_dataset(dataset, sequence_length=sequence_length), pad_id=pad_id)
    return [rows[number] for number in range(len(rows))]


@pytest.mark.parametrize(
    ("normalization", "weights", "units"),
    [
        ("target_token", [0, 1, 1, 0, 1, 1, 0], 4),
        ("target_sequence", [0, 1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0], 2),
        ("target_sequence_per_micro_batch", [0, 1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0], 1),
    ],
)
def test_the_worked_example(normalization, weights, units):
    batch = build_batch(rows_in_order([([6, 7], [8, 2]), ([4], [5, 2])]), normalization=normalization)
    assert batch.tokens.tolist() == [[6, 7, 8, 2, 4, 5, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [[7, 8, 2, 4, 5, 2, 0]]
    assert batch.loss_weights.tolist() == [weights]
    assert batch.num_loss_units == units
    assert (batch.num_examples, batch.num_tokens, batch.num_target_tokens) == (2, 7, 4)
    for name in ("tokens", "labels", "position_ids", "segment_ids"):
        assert getattr(batch, name).dtype == torch.int64 and getattr(batch, name).is_contiguous()
    assert batch.loss_weights.dtype == torch.float32


def by_hand(rows, normalization):
    """Oracle: loss weights as exact fractions, one token at a time."""
    length = len(rows[0].tokens) - 1
    weights = [[Fraction(0)] * length for _ in rows]
    targets = {}
    for r, row in enumerate(rows):
        for t in range(length):
            segment = row.segment_ids[t]
            if segment and row.segment_ids[t + 1] == segment and row.is_target[t + 1]:
                targets.setdefault((r, int(segment)), []).append(t)
    for (r, _), places in targets.items():
        for t in places:
            weights[r][t] = Fraction(1) if normalization == "target_token" else Fraction(1, len(places))
    if normalization == "target_sequence_per_micro_batch" and targets:
        weights = [[weight / len(targets) for weight in line] for line in weights]
    units = {
        "target_token": sum(map(len, targets.values())),
        "target_sequence": len(targets),
        "target_sequence_per_micro_batch": 1,
    }
    return weights, units[normalization], len(targets)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_weights_against_the_count_by_hand(normalization, seed):
    random = np.random.default_rng(seed)
    lengths = np.stack([random.integers(0, 6, 50), random.integers(1, 7, 50)], axis=1)
    examples = [(random.integers(0, 9, i).tolist(), random.integers(0, 9, t).tolist()) for i, t in lengths]
    rows = pack_examples(examples, sequence_length=16, pad_id=0, seed=seed)[:4]
    batch = build_batch(rows, normalization=normalization)
    weights, units, num_targets = by_hand(rows, normalization)
    np.testing.assert_allclose(batch.loss_weights.numpy(), np.array(weights, float), rtol=1e-6, atol=0)
    assert batch.num_loss_units == units
    if normalization == "target_sequence":
        assert batch.loss_weights.double().sum().item() == pytest.approx(num_targets, rel=1e-6)


def test_only_targets_of_the_same_segment_are_predicted():
    # A text after a pair: the token before it must not be trained to predict its first token.
    batch = build_batch(rows_in_order([([6], [8]), ([], [3, 4, 5])]), normalization="target_token")
    assert batch.labels.tolist() == [[8, 3, 4, 5, 0, 0, 0]]
    assert batch.loss_weights.tolist() == [[1, 0, 1, 1, 0, 0, 0]]


def test_text_counts_as_one_unit_and_a_single_token_as_none():
    batch = build_batch(rows_in_order([([], [3, 4, 5]), ([], [9])]), normalization="target_sequence")
    assert batch.loss_weights.tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0]]
    assert batch.num_loss_units == 1 and batch.num_examples == 2
    alone = build_batch(rows_in_order([([], [9])]), normalization="target_sequence")
    assert alone.num_loss_units == 0 and not alone.loss_weights.any()


def test_the_token_beyond_the_row_is_a_label_only():
    batch = build_batch(rows_in_order([([6, 7], [8, 2]), ([4], [5, 2, 3])]), normalization="target_sequence")
    assert batch.labels[0, -1] == 3 and batch.loss_weights[0, -1] == pytest.approx(1 / 3)
    assert batch.num_tokens == 7 and batch.num_target_tokens == 5


@pytest.mark.parametrize("pad_id", [0, 2, 8])
def test_a_padding_token_that_is_also_a_real_one_does_not_matter(pad_id):
    """2 ends both targets and 8 begins one; a mask made from `labels != pad` would lose them."""
    batch = build_batch(rows_in_order([([6, 7], [8, 2]), ([4], [5, 2])], pad_id=pad_id), normalization="target_token")
    assert batch.loss_weights.tolist() == [[0, 1, 1, 0, 1, 1, 0]]


def test_neighbouring_targets_of_two_rows_do_not_merge():
    """The reference's runs over the flattened mask would see one target of 4 tokens here, not two of 2."""
    rows = rows_in_order([([1] * 6, [3, 2]), ([], [9, 4, 2]), ([1] * 5, [5])])
    batch = build_batch(rows, normalization="target_sequence")
    assert batch.loss_weights[0].tolist() == [0, 0, 0, 0, 0, 0.5, 0.5]
    assert batch.loss_weights[1, :2].tolist() == [0.5, 0.5]
    assert batch.num_loss_units == 3


def test_micro_batches_weigh_targets_globally_or_each_alone():
    """One target in a micro-batch, nine in the next: globally each weighs 1/10, per micro-batch 1/2 against 1/18."""
    one = rows_in_order([([1] * 20, [2])], sequence_length=30)
    nine = rows_in_order([([1], [2])] * 9, sequence_length=30)
    for normalization, expected in [("target_sequence", (1 / 10, 1 / 10)), (NORMALIZATIONS[2], (1 / 2, 1 / 18))]:
        batches = [build_batch(rows, normalization=normalization) for rows in (one, nine)]
        units = sum(batch.num_loss_units for batch in batches)
        shares = tuple(float(batch.loss_weights.max()) / units for batch in batches)
        assert shares == pytest.approx(expected)


@pytest.mark.parametrize(("normalization", "units"), list(zip(NORMALIZATIONS, [0, 0, 1], strict=True)))
def test_padding_alone_weighs_nothing(normalization, units):
    batch = build_batch([empty_row(sequence_length=7, pad_id=0)] * 2, normalization=normalization)
    assert batch.num_loss_units == units and not batch.loss_weights.any()
    assert (batch.num_examples, batch.num_tokens, batch.num_target_tokens) == (0, 0, 0)
    assert not batch.position_ids.any()


def test_moving_keeps_what_is_not_a_tensor():
    batch = build_batch(rows_in_order([([6, 7], [8, 2])]), normalization="target_token")
    moved = batch.to("cpu")
    assert moved.rows is batch.rows and moved.num_loss_units == 2 and torch.equal(moved.tokens, batch.tokens)


class OnTheWay:
    """Stands for a tensor in the CPU's memory; says what is done to it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.steps = []

    def pin_memory(self):
        self.steps.append("page-locked")
        return self

    def to(self, device, *, non_blocking):
        self.steps.append((device, "not waited for" if non_blocking else "waited for"))
        return self


def test_a_gpu_is_given_page_locked_memory_and_nobody_waits():
    assert move(OnTheWay(), "cuda:1").steps == ["page-locked", ("cuda:1", "not waited for")]
    assert move(OnTheWay(), torch.device("cpu")).steps == [(torch.device("cpu"), "not waited for")]
