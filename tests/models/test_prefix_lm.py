"""Prefix-LM equals transformers' BLOOM under a mask of our own, at every layout, packed; faults are seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomForCausalLM

from megatron_xmtf.checkpoint.sharded import load_model_weights
from megatron_xmtf.config import ParallelConfig, RunConfig
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, empty_row, pack_examples
from megatron_xmtf.models.architecture import architecture_from_hf
from megatron_xmtf.models.forward import run_logits
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import prepare_run
from tests.layouts import LAYOUTS, PP, TP, layout
from tests.prefix_lm import prefix_logits
from tests.tiny import random_examples
from tests.training.gradients import assemble, hf_name, rank_gradients, relative_difference

TEXT = ([], [11, 12, 13, 14, 15, 16])
"""A text without inputs stays causal."""
EXAMPLES = [*random_examples(31, seed=5), TEXT]
TOLERANCE = 1e-4


def packed_rows() -> list[Row]:
    """Pack the examples, and complete a number of micro-batches of two that two ranks can share."""
    rows = pack_examples(EXAMPLES, sequence_length=64, pad_id=3)
    return rows + [empty_row(sequence_length=64, pad_id=3)] * (-len(rows) % 4)


ROWS = packed_rows()


@pytest.fixture(scope="module")
def expected(tiny_hf: Path) -> list[np.ndarray]:
    """Logits of each example alone."""
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).eval()
    with torch.no_grad():
        return [prefix_logits(model, *example).numpy() for example in EXAMPLES]


def rank_logits(
    parallel: ParallelConfig, hf_config: dict[str, Any], checkpoint: Path, change: Callable[[Batch], Batch]
) -> list[np.ndarray]:
    initialize_parallel(parallel, seed=1)
    chunks = build_model(architecture_from_hf(hf_config), parallel=parallel)
    load_model_weights(chunks, checkpoint)
    batches = [
        change(build_batch(ROWS[i : i + 2], normalization="target_token", prefix_lm=True))
        for i in range(0, len(ROWS), 2)
    ]
    return run_logits(chunks, batches, lambda batch, logits: logits.numpy())


def worst_difference(logits: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return max |ours - theirs| over all positions of all examples."""
    worst = 0.0
    for number, row in enumerate(ROWS):
        for segment, example in enumerate(row.example_ids.tolist(), start=1):
            places = np.flatnonzero(row.segment_ids[:-1] == segment)
            ours = logits[number // 2][number % 2][places]
            worst = max(worst, float(np.abs(ours - expected[example][: len(places)]).max()))
    return worst


def as_it_is(batch: Batch) -> Batch:
    return batch


def causal_inputs(batch: Batch) -> Batch:
    return replace(batch, prefix_mask=None)


def a_target_seen_before_its_turn(batch: Batch) -> Batch:
    """Mark one token more: the first target of each example, where it has inputs."""
    mask = batch.prefix_mask
    assert mask is not None
    longer = mask.clone()
    longer[:, 1:] |= mask[:, :-1] & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
    return replace(batch, prefix_mask=longer)


def text_as_inputs(batch: Batch) -> Batch:
    """Read every token of every example in both directions."""
    return replace(batch, prefix_mask=batch.segment_ids > 0)


def ask(world_size: int, parallel: ParallelConfig, hf: Path, checkpoint: Path, change: Callable[[Batch], Batch]) -> Any:
    hf_config = json.loads((hf / "config.json").read_text())
    return run_ranks(rank_logits, world_size=world_size, arguments=(parallel, hf_config, checkpoint, change))


@pytest.mark.parametrize("name", ["TP1", "TP2", "PP2", "TP2-PP2", "TP2-SP", "PP2-VPP2", "DP2"])
def test_logits_equal_transformers_with_a_mask(
    name: str, tiny_hf: Path, tiny_checkpoint: Path, expected: list[np.ndarray]
) -> None:
    world_size, parallel = (1, ParallelConfig()) if name == "TP1" else layout(name)
    for logits in ask(world_size, parallel, tiny_hf, tiny_checkpoint, as_it_is):
        assert worst_difference(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("fault", [causal_inputs, a_target_seen_before_its_turn, text_as_inputs])
def test_a_deliberate_fault_is_seen(
    fault: Callable[[Batch], Batch], tiny_hf: Path, tiny_checkpoint: Path, expected: list[np.ndarray]
) -> None:
    (logits,) = ask(1, ParallelConfig(), tiny_hf, tiny_checkpoint, fault)
    assert worst_difference(logits, expected) > 100 * TOLERANCE


def expected_gradients(tiny_hf: Path) -> dict[str, torch.Tensor]:
    """Let `transformers` and autograd do it, each example alone; the mean over targets of their mean token loss."""
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).train()
    for inputs, targets in EXAMPLES:
        first = max(len(inputs), 1)
        labels = torch.tensor([*inputs, *targets][first:])
        loss = torch.nn.functional.cross_entropy(prefix_logits(model, inputs, targets)[first - 1 : -1], labels)
        (loss / len(EXAMPLES)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def deal(rows: list[Row], prefix_lm: bool, dp_rank: int, dp_size: int) -> list[Batch]:
    batches = [
        build_batch(rows[i : i + 2], normalization="target_sequence", prefix_lm=prefix_lm)
        for i in range(0, len(rows), 2)
    ]
    return batches[dp_rank::dp_size]


def worst_gradient(config: RunConfig, world_size: int, rows: list[Row], hf: Path, *, prefix_lm: bool = True) -> float:
    prepared = prepare_run(config, world_size=world_size)
    shards = run_ranks(rank_gradients, world_size=world_size, arguments=(prepared, partial(deal, rows, prefix_lm)))
    wanted = expected_gradients(hf)
    differences = []
    for name, gradient in assemble(shards).items():
        reference = wanted.pop(hf_name(name))
        differences.append(relative_difference(gradient[: len(reference)], reference))
    assert not wanted
    return max(differences)


GRADIENT_RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "recompute-full": (1, {"recompute": {"granularity": "full"}}),
    "recompute-selective": (1, {"recompute": {"granularity": "selective"}}),
    "reference": (1, {"kernels": {"attention": "reference"}}),
    "TP2-PP2": (4, {"parallel": {TP: 2, PP: 2}}),
    "DP2": (2, {}),
    "TP2-SP-recompute-full": (2, {"parallel": LAYOUTS["TP2-SP"][1], "recompute": {"granularity": "full"}}),
    "PP2-VPP2": (2, {"parallel": LAYOUTS["PP2-VPP2"][1]}),
}


MORE_RUNS = ("recompute-selective", "reference", "DP2")
"""What logits and the kernels' own tests hold already."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MORE_RUNS else []) for name in GRADIENT_RUNS]
)
def test_packed_gradients_equal_transformers_with_a_mask(
    name: str, tiny_hf: Path, run_config: Callable[..., RunConfig]
) -> None:
    world_size, sections = GRADIENT_RUNS[name]
    config = run_config(loss={"normalization": "target_sequence"}, **sections)
    assert worst_gradient(config, world_size, ROWS, tiny_hf) <= TOLERANCE


def test_packed_equals_unpacked_and_causal_gradients_are_others(
    tiny_hf: Path, run_config: Callable[..., RunConfig]
) -> None:
    alone = [pack_examples([example], sequence_length=64, pad_id=3)[0] for example in EXAMPLES]
    config = run_config(loss={"normalization": "target_sequence"})
    assert worst_gradient(config, 1, alone, tiny_hf) <= TOLERANCE
    assert worst_gradient(config, 1, ROWS, tiny_hf, prefix_lm=False) > 100 * TOLERANCE
