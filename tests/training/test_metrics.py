"""Counts and rates of a step, the printed line, `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.training.flops import model_flops_per_token, useful_flops
from megatron_xmtf.training.metrics import (
    MetricsFile,
    StepCounts,
    StepRates,
    peak_memory_gib,
    printed_line,
    validation_line,
)

MODEL = BloomArchitecture(hidden_size=64, num_layers=2, num_attention_heads=4, vocab_size=300)


def test_counts_of_micro_batches() -> None:
    rows = [
        pack_examples([([6, 7], [8, 2])], sequence_length=7, pad_id=0)[0],
        pack_examples([([4], [5, 2]), ([3], [2])], sequence_length=7, pad_id=0)[0],
    ]
    batches = [build_batch([row], normalization="target_token") for row in rows]
    # A row's last real token is a label only where padding does not follow it; here it is read too.
    # Segments of 4; of 3 and 2: 10 + 6 + 3 pairs.
    wanted = StepCounts(rows=2, examples=3, tokens=4 + 5, target_tokens=2 + 3, attention_pairs=19)
    assert StepCounts.of(batches) == wanted


COUNTS = StepCounts(rows=8, examples=30, tokens=448, target_tokens=100, attention_pairs=4000)


def rates(**changes: Any) -> dict[str, float | None]:
    values: dict[str, Any] = {"sequence_length": 64, "world_size": 2, "precision": "bf16", "peak_tflops": 0.5}
    return StepRates(MODEL, **{**values, **changes}).of(COUNTS, seconds=0.5)


def example_metrics(step: int = 3, **changes: Any) -> dict[str, Any]:
    values = {
        **{"step": step, "loss": 2.5, "grad_norm": 0.75, "learning_rate": 1e-4},
        **rates(peak_tflops=None),
        **{"peak_memory_gib": 1.5, "loss_scale": None, "skipped": False},
    }
    return {**values, **changes}


def test_rates_of_a_step() -> None:
    found = rates()
    assert found["fill_fraction"] == 448 / 512
    assert found["step_time_ms"] == 500.0
    assert found["tokens_per_second"] == 896.0
    assert found["target_tokens_per_second"] == 200.0
    # Padding is computed too: 512 tokens in half a second on two ranks.
    per_token = model_flops_per_token(MODEL, sequence_length=64)
    assert found["model_tflops_per_gpu"] == pytest.approx(512 * per_token / 0.5 / 2 / 1e12)
    assert found["mfu_percent"] == pytest.approx(100 * 512 * per_token / 0.5 / 2 / 1e12 / 0.5)
    useful = useful_flops(MODEL, tokens=448, attention_pairs=4000, target_tokens=100)
    assert found["useful_tflops_per_gpu"] == pytest.approx(useful / 0.5 / 2 / 1e12)
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU whose peak may be known")
def test_no_utilisation_where_no_peak_is_known() -> None:
    assert rates(peak_tflops=None)["mfu_percent"] is None


def test_this_process_holds_some_memory() -> None:
    assert 0.01 < peak_memory_gib() < 1000


def printed(**values: Any) -> str:
    eta = values.pop("eta_seconds", 61.9)
    return printed_line(example_metrics(**values), train_steps=100, eta_seconds=eta)


def test_the_printed_line_has_fixed_columns() -> None:
    lines = [
        printed(),
        printed(step=100, eta_seconds=0.0),
        printed(grad_norm=None),
        printed(loss=11.25, eta_seconds=3725),
    ]
    assert lines[0].startswith("step   3/100  loss   2.5000  norm    0.750  lr 1.00e-04  fill  87.5%")
    assert lines[0].endswith("GiB  eta     1:01")
    assert lines[3].endswith("GiB  eta  1:02:05")
    assert {len(line) for line in lines} == {len(lines[0])}
    assert {line.index("TFLOP/s") for line in lines} == {lines[0].index("TFLOP/s")}


def test_columns_of_what_not_every_run_has() -> None:
    assert "mfu" not in printed() and "scale" not in printed()
    assert "TFLOP/s  mfu 41.3%" in printed(mfu_percent=41.26)
    assert "GiB  scale    65536  eta" in printed(loss_scale=65536.0)
    assert printed(loss_scale=65536.0, skipped=True).endswith("1:01  skipped")


def test_validation_losses_are_worded_by_dataset_and_language() -> None:
    losses = {"loss/facts": 1.0, "loss/facts/en": 0.5, "loss/facts/sw": 1.5, "loss/other": 2.0}
    assert validation_line(4, losses) == "step 4 validation  facts 1.0000  (en 0.5000)  (sw 1.5000)  other 2.0000"
    slashes = {"loss/qa/squad": 1.0, "loss/qa/squad/en": 0.5, "loss/qa/other": 2.0}
    assert validation_line(4, slashes) == "step 4 validation  qa/squad 1.0000  (en 0.5000)  qa/other 2.0000"


def test_lines_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resumed_step=0)
    for step in range(1, 6):
        first.record({"step": step, "run": 1})
    first.close()
    with open(path, "a") as stream:
        stream.write('{"step": 6, "ru')  # the writer was killed
    second = MetricsFile(path, resumed_step=3)
    second.record({"step": 4, "run": 2})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["run"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_line_is_there_for_readers_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.record({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.close()
