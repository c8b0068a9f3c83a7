"""A run's own checkpoints: the best one stays, and Hugging Face models are written while it trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.trainer import train_rank
from tests.checkpoint.test_sharded import read_metrics, read_tensors, train_to


def test_the_best_is_kept_and_the_last_is_exported(run_config: Callable[..., RunConfig], tiny_pairs: Path) -> None:
    data = {"train": [{"prefix": str(tiny_pairs)}], "validation": [{"prefix": str(tiny_pairs), "name": "seen"}]}
    config = run_config(
        data=data,
        schedule={"train_steps": 5},
        optimizer={"lr": 0.3},  # so large that the loss goes up: the first checkpoint is the best
        evaluation={"interval": 1, "rows": 4},
        checkpoint={"save_interval": 1, "keep_best": {"metric": "loss/seen"}, "export_huggingface": "last"},
    )
    metrics = train_to(config, 2)
    losses = {step: record["loss/seen"] for step, record in metrics.items()}
    best = min(losses, key=lambda step: losses[step])
    assert best < 4, f"the best is not among the last two anyway: {losses}"
    run = Path(config.output)
    assert [step for step, _ in list_checkpoints(run)] == [best, 4, 5]
    for step, path in list_checkpoints(run):
        assert open_manifest(path).metrics["loss/seen"] == losses[step]
    assert [path.name for path in (run / "hf").iterdir()] == ["step_0000005"]
    exported = load_file(run / "hf" / "step_0000005" / "model.safetensors")
    stored = read_tensors(run / "checkpoints" / "step_0000005")
    (norm,) = [tensor for name, tensor in exported.items() if name.endswith("ln_f.weight")]
    assert torch.equal(norm, stored["decoder.final_layernorm.weight"])


def test_a_metric_that_is_not_measured_is_named(run_config: Callable[..., RunConfig], tiny_pairs: Path) -> None:
    data = {"train": [{"prefix": str(tiny_pairs)}], "validation": [{"prefix": str(tiny_pairs), "name": "seen"}]}
    config = run_config(
        data=data,
        schedule={"train_steps": 1},
        evaluation={"interval": 1, "rows": 4},
        checkpoint={"keep_best": {"metric": "loss/sen"}},
    )
    prepared = prepare_run(config, world_size=2)
    with pytest.raises(ConfigError, match=r"keep_best.metric='loss/sen' is not measured; nearest: loss/seen"):
        run_ranks(train_rank, world_size=2, arguments=(prepared,))
    assert read_metrics(Path(config.output)).keys() == {1}


def test_the_best_of_what_is_never_measured_is_refused(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best needs evaluation\.interval"):
        run_config(checkpoint={"keep_best": {"metric": "loss/seen"}})
