"""A dry run sizes what a run would hold: against closed formulas, published counts, and a run really built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.cli import main
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training import dry_run as dry_run_module
from megatron_xmtf.training.dry_run import dry_run, size_stages
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import COUNTED, LAYOUTS, PP, TP
from tests.tiny import write_tiny_tokenizer

BLOOM = BloomArchitecture(hidden_size=14336, num_layers=70, num_attention_heads=112, vocab_size=250880)


@pytest.mark.parametrize(
    ("section", "ranks", "rows"),
    [
        (
            {PP: 72, **COUNTED, "use_distributed_optimizer": True},
            288,
            [([0, 0], 0, 3_596_644_352), ([1, 70], 1, 2_466_437_120), ([71, 71], 0, 3_596_644_352)],
        ),
        (
            # Counted by hand: (4 x 14,336 in norms and) 250,880 / 4 words; layers of 12 h^2 / 4 + 7 h / 4 + 6 h.
            {TP: 4, PP: 12, **COUNTED, "sequence_parallel": True},
            384,
            [([0, 0], 5, 3_982_522_880 + 28_672), ([1, 10], 6, 3_700_042_752), ([11, 11], 5, 3_982_551_552)],
        ),
    ],
)
def test_bloom_176b_at_its_real_layouts(section: dict[str, Any], ranks: int, rows: Any, run_config: Any) -> None:
    config = run_config(parallel=section, precision="bf16")
    stages, parameters = size_stages(BLOOM, config, world_size=ranks)
    assert parameters == 176_247_271_424
    assert [(stage.stages, stage.layers, stage.parameters) for stage in stages] == rows
    for stage in stages:
        assert (stage.weight_bytes, stage.gradient_bytes) == (2 * stage.parameters, 4 * stage.parameters)
        assert stage.optimizer_bytes == 12 * stage.parameters // (4 if "use_distributed_optimizer" in section else 1)


def rank_sizes(prepared: PreparedRun) -> tuple[int, int, int]:
    """Build and step a trainer in one rank; return bytes of weights, gradients and optimizer state."""
    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    trainer.train_step()
    weights = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    state = {
        id(tensor): tensor
        for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        for values in part.optimizer.state.values()
        for tensor in values.values()
        if torch.is_tensor(tensor) and tensor.dim() > 0
    }
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if prepared.config.precision != "fp32":
        for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
            held += sum(4 * tensor.numel() for group in part.optimizer.param_groups for tensor in group["params"])
    bytes_of = [tensor.numel() * tensor.element_size() for tensor in weights]
    return sum(bytes_of), sum(w.main_grad.numel() * w.main_grad.element_size() for w in weights), held


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (1, {}),
        (4, {"parallel": {TP: 2, PP: 2, **COUNTED}, "precision": "bf16"}),
        (2, {"parallel": {"use_distributed_optimizer": True}, "precision": "fp16"}),
        (2, {"parallel": LAYOUTS["PP2-VPP3-counted"][1]}),
        (2, {"parallel": {TP: 2}, "optimizer": {"name": "adafactor"}, "precision": "bf16"}),
    ],
)
def test_sizes_are_those_of_a_run_that_is_built(
    ranks: int, sections: dict[str, Any], run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(**sections)
    prepared = prepare_run(config, world_size=ranks)
    stages, _ = size_stages(prepared.architecture, config, world_size=ranks)
    built = run_ranks(rank_sizes, world_size=ranks, arguments=(prepared,))
    share = ranks // config.parallel.pipeline_model_parallel_size
    wanted = [
        (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes)
        for stage in stages
        for _ in range(stage.count * share)
    ]
    assert [sizes[:2] for sizes in built] == [sizes[:2] for sizes in wanted]
    for ours, theirs in zip(wanted, built, strict=True):
        # Shards of the distributed optimizer are cut where 128 divides, so ranks differ by the buffers' padding.
        assert ours[2] == pytest.approx(theirs[2], rel=0.01)
        assert config.parallel.use_distributed_optimizer or ours[2] == theirs[2]


def test_a_layer_that_no_stage_holds_is_seen(run_config: Callable[..., RunConfig], monkeypatch: Any) -> None:
    counted = dry_run_module._parameters_of_stages

    def without_one(*arguments: Any) -> Any:
        return [parameters[:-1] for parameters in counted(*arguments)]

    monkeypatch.setattr(dry_run_module, "_parameters_of_stages", without_one)
    architecture = BloomArchitecture(hidden_size=64, num_layers=4, num_attention_heads=4, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"add up to 219,328, the model has 219,392"):
        size_stages(architecture, run_config(), world_size=1)


@pytest.fixture
def bare_model(tmp_path: Path) -> Path:
    """A directory with config.json and a tokenizer, and no weights."""
    model = tmp_path / "bare"
    write_tiny_tokenizer(model)
    sizes = {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300}
    (model / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}), encoding="utf-8")
    return model


def test_a_model_without_weights_can_be_checked_and_leaves_no_import(
    bare_model: Path, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(model=str(bare_model), parallel={PP: 2, **COUNTED})
    checked = dry_run(config, world_size=8)
    assert (checked.data_parallel_size, checked.parameters) == (4, 300 * 64 + 4 * (12 * 64**2 + 13 * 64) + 4 * 64)
    assert checked.training_tokens == 20 * 8 * 64
    assert checked.tokens_per_step == 8 * 64
    assert {path.name for path in Path(config.output).iterdir()} == {"config.yaml", "packing"}


def test_tokens_under_a_batch_size_ramp(bare_model: Path, run_config: Callable[..., RunConfig]) -> None:
    ramp = {"start": 4, "increment": 4, "rows": 16}  # four steps of 4 rows, then 16 of 8
    batch = {"micro_batch_size": 1, "global_batch_size": 8, "sequence_length": 64, "rampup_batch_size": ramp}
    checked = dry_run(run_config(model=str(bare_model), batch=batch), world_size=4)
    assert (checked.train_steps, checked.training_tokens) == (20, (4 * 4 + 16 * 8) * 64)
    assert "20 steps x 461 tokens = 9,216 tokens" in checked.table()


def test_weights_that_are_there_are_matched(
    tiny_hf: Path, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    import shutil

    model = shutil.copytree(tiny_hf, tmp_path / "other")
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**values, "n_layer": 5}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not hold the tensors of a bloom with 5 layers"):
        dry_run(run_config(model=str(model)), world_size=1)


def test_ranks_that_do_not_fit_are_refused(bare_model: Path, run_config: Callable[..., RunConfig]) -> None:
    config = run_config(model=str(bare_model), parallel={PP: 2})
    with pytest.raises(ConfigError, match="3 ranks cannot hold"):
        dry_run(config, world_size=3)


def test_the_command_prints_a_table_or_json(
    bare_model: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data={{train: [{{prefix: {tiny_pairs}}}], validation: [{{prefix: {tiny_pairs}, name: held}}]}}"
    words = ["train", "bloomz-176b", data, f"model={bare_model}", f"output={tmp_path / 'run'}", "--overlay", "toy"]
    assert main([*words, "--dry-run", "--world-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "TP1 x PP2 x DP8" in out
    assert "everything is in place; not trained" in out
    assert main([*words, "--dry-run", "--world-size", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["layers"] for stage in result["stages"]] == [2, 2]
    assert main([*words, "--world-size", "16"]) == 2
    assert "--world-size is for --dry-run" in capsys.readouterr().err
