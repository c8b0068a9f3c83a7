"""Gradients of a packed global batch equal those of `transformers` on the same examples, one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomForCausalLM

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.prepare import prepare_run
from tests.layouts import LAYOUTS
from tests.tiny import random_examples
from tests.training.gradients import assemble, hf_name, rank_gradients, relative_difference

Example = tuple[list[int], list[int]]
EXAMPLES: list[Example] = random_examples(32, seed=5)
TOLERANCE = 1e-4


def expected_gradients(
    tiny_hf: Path, normalization: str, examples: list[Example] = EXAMPLES
) -> dict[str, torch.Tensor]:
    """Let `transformers` and autograd do it, each example alone; the weights of DESIGN 4 written out by hand."""
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).train()
    total_tokens = sum(len(targets) for _, targets in examples)
    for inputs, targets in examples:
        logits = model(torch.tensor([inputs + targets])).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[len(inputs) - 1 : -1], torch.tensor(targets), reduction="none"
        )
        if normalization == "target_token":
            (losses.sum() / total_tokens).backward()
        else:
            (losses.mean() / len(examples)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def packed_rows(count_multiple: int) -> list[Row]:
    """Pack the examples and fill up with rows of padding to a multiple."""
    rows = pack_examples(EXAMPLES, sequence_length=64, pad_id=3)
    return rows + [padding_like(rows[0])] * (-len(rows) % count_multiple)


def unpacked_rows() -> list[Row]:
    """One example a row."""
    return [pack_examples([example], sequence_length=64, pad_id=3)[0] for example in EXAMPLES]


def padding_like(row: Row) -> Row:
    import numpy as np

    return Row(
        np.full_like(row.tokens, 3),
        np.zeros_like(row.segment_ids),
        np.zeros_like(row.is_target),
        row.dataset_ids[:0],
        row.example_ids[:0],
    )


def deal(rows: list[Row], normalization: Any, dp_rank: int, dp_size: int) -> list[Batch]:
    """Cut rows into micro-batches of two and deal them to data-parallel ranks."""
    batches = [build_batch(rows[i : i + 2], normalization=normalization) for i in range(0, len(rows), 2)]
    return batches[dp_rank::dp_size]


def ours(
    run_config: Callable[..., RunConfig], name: str, rows: list[Row], normalization: str, **sections: Any
) -> dict[str, torch.Tensor]:
    world_size, section = (1, {}) if name == "TP1" else LAYOUTS[name]
    config = run_config(parallel=section, loss={"normalization": normalization}, **sections)
    prepared = prepare_run(config, world_size=world_size)
    shards = run_ranks(rank_gradients, world_size=world_size, arguments=(prepared, partial(deal, rows, normalization)))
    return assemble(shards)


def worst(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert {hf_name(name) for name in gradients} == set(reference)
    differences = []
    for name, gradient in gradients.items():
        wanted = reference[hf_name(name)]
        if name == "embedding.word_embeddings.weight":
            assert not gradient[len(wanted) :].any(), "rows that only pad the vocabulary must get no gradient"
            gradient = gradient[: len(wanted)]
        differences.append((relative_difference(gradient, wanted), name))
    return max(differences)


@pytest.mark.parametrize("normalization", ["target_token", "target_sequence"])
@pytest.mark.parametrize("name", ["TP1", "TP2-PP2", "DP2", "TP2-SP", "PP6-counted"])
def test_packed_gradients_equal_transformers(
    name: str, normalization: str, tiny_hf: Path, run_config: Callable[..., RunConfig]
) -> None:
    gradients = ours(run_config, name, packed_rows(count_multiple=4), normalization)
    difference, tensor = worst(gradients, expected_gradients(tiny_hf, normalization))
    assert difference <= TOLERANCE, f"{tensor}: {difference:.2e}"


KERNELS = {
    "reference": dict.fromkeys(
        ("attention", "head_loss", "bias_dropout_add", "activation", "adam", "weight_gradient"), "reference"
    ),
    "fused": dict.fromkeys(("attention", "head_loss", "bias_dropout_add"), "fused"),
}
"""The readable ones, and our own in Triton (interpreted where there is no GPU)."""


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        pytest.param("reference", "TP1", marks=pytest.mark.slow),
        ("reference", "TP2-SP"),
        ("fused", "TP2-SP"),
    ],
)
def test_kernels_by_name_give_the_gradients_of_transformers(
    kernels: str, name: str, tiny_hf: Path, run_config: Callable[..., RunConfig]
) -> None:
    pytest.importorskip("triton")
    examples = EXAMPLES[:3]  # one micro-batch: the interpreter takes its time
    rows = pack_examples(examples, sequence_length=64, pad_id=3)
    gradients = ours(run_config, name, rows, "target_token", kernels=KERNELS[kernels])
    difference, tensor = worst(gradients, expected_gradients(tiny_hf, "target_token", examples))
    assert difference <= TOLERANCE, f"{tensor}: {difference:.2e}"


def test_megatron_core_s_gelu_gives_the_same(
    tiny_hf: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `kernels.activation` chooses on a GPU, as it is written: compiling it for a CPU would take a minute."""
    monkeypatch.setattr("megatron_xmtf.models.engine_settings.choose_activation", lambda *_, **__: "megatron_core")
    with torch.compiler.set_stance("force_eager"):
        gradients = ours(run_config, "TP2-SP", packed_rows(count_multiple=4), "target_token")
    assert worst(gradients, expected_gradients(tiny_hf, "target_token"))[0] <= TOLERANCE


def test_packed_equals_unpacked(tiny_hf: Path, run_config: Callable[..., RunConfig]) -> None:
    gradients = ours(run_config, "TP1", unpacked_rows(), "target_sequence")
    assert worst(gradients, expected_gradients(tiny_hf, "target_sequence"))[0] <= TOLERANCE


def test_a_leaked_segment_is_seen(
    tiny_hf: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_xmtf.models.bloom as bloom

    prepare = bloom.BloomModel.prepare_attention
    monkeypatch.setattr(
        bloom.BloomModel,
        "prepare_attention",
        lambda model, segment_ids, prefix_mask: prepare(model, torch.ones_like(segment_ids), prefix_mask),
    )
    gradients = ours(run_config, "TP1", packed_rows(count_multiple=4), "target_sequence")
    assert worst(gradients, expected_gradients(tiny_hf, "target_sequence"))[0] > 100 * TOLERANCE
