"""FLOPs against published runs; counts, rates and `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.training.metrics import (
    MetricsFile,
    StepCounts,
    model_flops_per_token,
    peak_memory_gib,
    printed_line,
    step_metrics,
    validation_line,
)

A100_PEAK = 312e12

CONTRACT = [
    *("step", "loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "target_tokens", "fill_fraction"),
    *("step_time_ms", "tokens_per_second", "target_tokens_per_second", "model_tflops_per_gpu", "mfu_percent"),
    "peak_memory_gib",
]


def architecture(layers: int, hidden_size: int, vocab_size: int) -> BloomArchitecture:
    return BloomArchitecture(
        num_layers=layers, hidden_size=hidden_size, num_attention_heads=hidden_size // 128, vocab_size=vocab_size
    )


@pytest.mark.parametrize(
    ("rows", "layers", "hidden_size", "seconds", "published"),
    [
        # bigscience repository, train/tr11-176B-ml/chronicles-prequel.md: 384 A100, TFLOP/s with full recomputation
        (2048, 70, 14336, 104.50, 150.05),
        (2048, 70, 14336, 121.63, 128.92),
        (2048, 70, 14336, 102.03, 153.68),
        (512, 78, 13824, 35.77, 113.52),
        (1024, 78, 13824, 59.65, 136.15),
        (1536, 78, 13824, 83.11, 146.59),
        (2048, 78, 13824, 107.12, 151.64),
    ],
)
def test_flops_reproduce_the_rates_that_bloom_reported(
    rows: int, layers: int, hidden_size: int, seconds: float, published: float
) -> None:
    model = architecture(layers, hidden_size, 250_880)
    head = 6 * 250_880 * hidden_size  # the output layer is not computed again
    body = model_flops_per_token(model, sequence_length=2048) - head
    # Recomputation adds one more forward pass to forward and backward, 4/3 of the body.
    hardware_flops = (body * 4 / 3 + head) * rows * 2048
    assert hardware_flops / seconds / 384 / 1e12 == pytest.approx(published, rel=1e-3)


def test_the_rate_of_bloom_in_model_flops() -> None:
    flops = model_flops_per_token(architecture(70, 14336, 250_880), sequence_length=2048) * 2048 * 2048
    assert flops / 104.50 / 384 / 1e12 == pytest.approx(113.1, abs=0.1)


@pytest.mark.parametrize(
    ("layers", "hidden_size", "rows", "gpus", "seconds", "published_percent", "tolerance"),
    [
        # Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 5
        (48, 6144, 4, 8, 1.10, 41.5, 0.3),  # the time has three digits only
        (96, 12288, 64, 64, 13.75, 51.4, 0.1),
        (105, 20480, 280, 280, 37.83, 56.0, 0.1),
        (128, 25600, 512, 512, 71.49, 56.3, 0.1),
    ],
)
def test_flops_reproduce_published_utilisation(
    layers: int, hidden_size: int, rows: int, gpus: int, seconds: float, published_percent: float, tolerance: float
) -> None:
    per_token = model_flops_per_token(architecture(layers, hidden_size, 51_200), sequence_length=2048)
    percent = 100 * per_token * rows * 2048 / seconds / gpus / A100_PEAK
    assert percent == pytest.approx(published_percent, abs=tolerance)


def test_flops_count_every_matrix_once_forward_and_twice_backward() -> None:
    # 2 FLOPs a weight and token forward: QKV 3hh, projection hh, feed-forward 8hh, head Vh; attention 4sh a layer.
    hidden, layers, vocab, sequence = 64, 3, 256, 32
    forward = layers * (2 * 12 * hidden**2 + 4 * sequence * hidden) + 2 * vocab * hidden
    found = model_flops_per_token(architecture(layers, hidden, vocab), sequence_length=sequence)
    assert found == pytest.approx(3 * forward)


def test_counts_of_micro_batches() -> None:
    rows = [
        pack_examples([([6, 7], [8, 2])], sequence_length=7, pad_id=0)[0],
        pack_examples([([4], [5, 2]), ([3], [2])], sequence_length=7, pad_id=0)[0],
    ]
    batches = [build_batch([row], normalization="target_token") for row in rows]
    # A row's last real token is a label only where padding does not follow it; here it is read too.
    assert StepCounts.of(batches) == StepCounts(rows=2, examples=3, tokens=4 + 5, target_tokens=2 + 3)


def example_metrics(step: int = 3) -> dict[str, object]:
    return step_metrics(
        step=step,
        loss=2.5,
        grad_norm=0.75,
        learning_rate=1e-4,
        counts=StepCounts(rows=8, examples=30, tokens=448, target_tokens=100),
        seconds=0.5,
        flops_per_token=1e9,
        sequence_length=64,
        world_size=2,
    )


def test_rates_of_a_step() -> None:
    found = example_metrics()
    assert list(found) == CONTRACT
    assert found["fill_fraction"] == 448 / 512
    assert found["step_time_ms"] == 500.0
    assert found["tokens_per_second"] == 896.0
    assert found["target_tokens_per_second"] == 200.0
    # Padding is computed too: 512 tokens in half a second on two ranks.
    assert found["model_tflops_per_gpu"] == pytest.approx(512 * 1e9 / 0.5 / 2 / 1e12)
    json.dumps(found, allow_nan=False)


def test_this_process_holds_some_memory() -> None:
    assert 0.01 < peak_memory_gib() < 1000


def test_the_printed_line_has_fixed_columns() -> None:
    lines = [
        printed_line(example_metrics(step), train_steps=100, eta_seconds=eta)  # type: ignore[arg-type]
        for step, eta in ((3, 61.9), (100, 61.0))
    ]
    assert lines[0].startswith("step   3/100  loss   2.5000  norm    0.750  lr 1.00e-04  fill  87.5%")
    assert lines[0].endswith("eta 1:01")
    assert len(lines[0]) == len(lines[1])
    assert printed_line(
        {**example_metrics(), "grad_norm": None},
        train_steps=100,
        eta_seconds=3725,  # type: ignore[arg-type]
    ).endswith("eta 1:02:05")


def test_validation_losses_are_worded_by_dataset_and_language() -> None:
    losses = {"loss/facts": 1.0, "loss/facts/en": 0.5, "loss/facts/sw": 1.5, "loss/other": 2.0}
    assert validation_line(4, losses) == "step 4 validation  facts 1.0000  (en 0.5000)  (sw 1.5000)  other 2.0000"


def test_lines_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resumed_step=0)
    for step in range(1, 6):
        first.append({"step": step, "run": 1})
    first.close()
    with open(path, "a") as stream:
        stream.write('{"step": 6, "ru')  # the writer was killed
    second = MetricsFile(path, resumed_step=3)
    second.append({"step": 4, "run": 2})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["run"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_line_is_there_for_readers_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.append({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.close()
