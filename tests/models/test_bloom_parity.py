"""Our BLOOM equals `transformers` at every layout, and each of three deliberate faults is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from transformers import BloomForCausalLM

from megatron_xmtf.checkpoint.sharded import load_model_weights
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from megatron_xmtf.models.architecture import architecture_from_hf
from megatron_xmtf.models.forward import run_forward, run_logits
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.layouts import layout
from tests.tiny import random_examples, write_tiny_bloom

EXAMPLES = random_examples(40)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    packed = pack_examples(EXAMPLES, sequence_length=64, pad_id=3)
    # An odd number of micro-batches of two: no layout may depend on its being a multiple of anything.
    chosen = packed[: (len(packed) // 4 * 2 - 1) * 2]
    assert len(chosen) // 2 % 2 == 1
    return chosen


@pytest.fixture(scope="module")
def expected(tiny_hf: Path) -> dict[int, np.ndarray]:
    """Logits of `transformers`, each example alone: example -> [length, vocab]."""
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).eval()
    with torch.no_grad():
        return {
            number: model(torch.tensor([inputs + targets])).logits[0].numpy()
            for number, (inputs, targets) in enumerate(EXAMPLES)
        }


def rank_logits(
    parallel: ParallelConfig, hf_config: dict[str, Any], checkpoint: Path, rows: list[Row], fault: str
) -> list[np.ndarray]:
    """Compute the logits of all rows in one rank, after breaking what `fault` names."""
    initialize_parallel(parallel, seed=1)
    import megatron_xmtf.models.bloom as bloom

    if fault == "flipped ALiBi":
        straight = bloom.alibi_slopes
        bloom.alibi_slopes = lambda heads: -straight(heads)
    if fault == "leaked segment":
        prepare = bloom.BloomModel.prepare_attention
        bloom.BloomModel.prepare_attention = lambda model, segment_ids, prefix_mask: prepare(
            model, torch.ones_like(segment_ids), prefix_mask
        )
    chunks = build_model(architecture_from_hf(hf_config), parallel=parallel)
    load_model_weights(chunks, checkpoint)
    if fault == "swapped QKV":
        weight = chunks[0].decoder.layers[0].self_attention.linear_qkv.weight.data
        heads, width = 4, weight.size(1)
        parts = weight.view(heads, 3, -1, width)
        weight.copy_(parts[:, [1, 0, 2]].reshape(weight.shape))
    batches = [build_batch(rows[i : i + 2], normalization="target_token") for i in range(0, len(rows), 2)]
    return run_logits(chunks, batches, lambda batch, logits: logits.numpy())


def worst_difference(rows: list[Row], logits: list[np.ndarray], expected: dict[int, np.ndarray]) -> float:
    """Return max |ours - theirs| over all positions of all examples."""
    worst = 0.0
    for number, row in enumerate(rows):
        for segment, example in enumerate(row.example_ids, start=1):
            places = np.flatnonzero(row.segment_ids[:-1] == segment)
            ours = logits[number // 2][number % 2][places]
            worst = max(worst, float(np.abs(ours - expected[int(example)][: len(places)]).max()))
    return worst


def config_of(tiny_hf: Path) -> dict[str, Any]:
    import json

    return json.loads((tiny_hf / "config.json").read_text())


@pytest.mark.parametrize("name", ["TP1", "TP2", "PP2", "TP2-PP2", "TP2-SP", "PP2-VPP2", "DP2"])
def test_logits_equal_transformers(
    name: str, tiny_hf: Path, tiny_checkpoint: Path, rows: list[Row], expected: dict[int, np.ndarray]
) -> None:
    world_size, parallel = (1, ParallelConfig()) if name == "TP1" else layout(name)
    results = run_ranks(
        rank_logits, world_size=world_size, arguments=(parallel, config_of(tiny_hf), tiny_checkpoint, rows, "")
    )
    spread = np.concatenate(list(expected.values())).std()
    assert spread > 1.0, "the weights must be wide enough for the comparison to mean something"
    for logits in results:
        assert worst_difference(rows, logits, expected) <= TOLERANCE


@pytest.mark.parametrize("fault", ["flipped ALiBi", "leaked segment", "swapped QKV"])
def test_a_deliberate_fault_is_seen(
    fault: str, tiny_hf: Path, tiny_checkpoint: Path, rows: list[Row], expected: dict[int, np.ndarray]
) -> None:
    arguments = (ParallelConfig(), config_of(tiny_hf), tiny_checkpoint, rows, fault)
    logits = run_ranks(rank_logits, world_size=1, arguments=arguments)[0]
    assert worst_difference(rows, logits, expected) > 100 * TOLERANCE


def test_changing_one_example_changes_no_other(tiny_hf: Path, tiny_checkpoint: Path, rows: list[Row]) -> None:
    row = rows[0]
    assert row.segment_ids.max() >= 2
    changed_tokens = row.tokens.copy()
    changed_tokens[row.segment_ids == 1] = 77
    changed = Row(changed_tokens, row.segment_ids, row.is_target, row.dataset_ids, row.example_ids)
    arguments = (ParallelConfig(), config_of(tiny_hf), tiny_checkpoint, [row, changed], "")
    before, after = run_ranks(rank_logits, world_size=1, arguments=arguments)[0][0]
    others = row.segment_ids[:-1] > 1
    assert np.array_equal(before[others], after[others])
    assert not np.allclose(before[row.segment_ids[:-1] == 1], after[row.segment_ids[:-1] == 1])


def rank_losses(
    precision: Any, hf_config: dict[str, Any], checkpoint: Path, rows: list[Row]
) -> tuple[list[float], np.ndarray]:
    """Return the ALiBi slopes that a rank uses, and its losses [micro_batch, sequence] of two rows."""
    initialize_parallel(ParallelConfig(), seed=1)
    chunks = build_model(architecture_from_hf(hf_config), parallel=ParallelConfig(), precision=precision)
    load_model_weights(chunks, checkpoint)
    batch = build_batch(rows[:2], normalization="target_token")
    [losses] = run_forward(chunks, [batch], lambda batch, losses: (losses * batch.loss_weights).numpy())
    return unwrap_model(chunks[0]).slopes.tolist(), losses


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_losses_and_fp32_slopes(precision: str, tmp_path: Path, rows: list[Row]) -> None:
    # The slopes of 16 heads are no powers of two, so that a cast would show; 300 words, so that there are padded ones.
    write_tiny_bloom(tmp_path / "hf", heads=16)
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")

    def losses_in(precision: str) -> tuple[list[float], np.ndarray]:
        arguments = (precision, config_of(tmp_path / "hf"), tmp_path / "checkpoint", rows)
        return run_ranks(rank_losses, world_size=1, arguments=arguments)[0]

    (slopes, half), (_, single) = losses_in(precision), losses_in("fp32")
    assert slopes == alibi_slopes(16).tolist()
    assert np.abs(half - single).max() < 0.2
    assert half.sum() == pytest.approx(single.sum(), rel=5e-3)
