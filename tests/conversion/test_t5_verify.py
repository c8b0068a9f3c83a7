"""`xmtf verify` of encoder-decoders: logits of the parallel engine against transformers, wherever stages are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_xmtf.cli import main
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.verify_logits import compare_logits
from megatron_xmtf.errors import ExitCode
from tests.tiny import write_tiny_t5

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [(1, {}), (2, {PP: 2, "pipeline_layers": [2, 5]}), (4, {TP: 2, PP: 2, SP: True, "pipeline_layers": [5, 2]})],
    ids=["TP1", "PP2-inside-encoder", "TP2-SP-PP2-inside-decoder"],
)
def test_logits_are_those_of_transformers(
    tiny_mt5_checkpoint: Path, tiny_mt5_hf: Path, ranks: int, sizes: dict[str, object]
) -> None:
    parallel = ParallelConfig(**sizes)  # type: ignore[arg-type]
    found = compare_logits(tiny_mt5_checkpoint, tiny_mt5_hf, parallel=parallel, world_size=ranks)
    assert found.within_tolerance and found.max_abs_difference < 1e-4
    assert found.reference_std > 1 and found.positions > 300 and found.prompts == "fixed multilingual prompts"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_logits_of_both_t5_are_those_of_transformers(version: str, tmp_path: Path) -> None:
    """Tied and scaled, and neither, over a pipeline whose ends both hold a tied table."""
    write_tiny_t5(tmp_path / "hf", version=version)
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    found = compare_logits(tmp_path / "checkpoint", tmp_path / "hf", parallel=ParallelConfig(**{PP: 2}), world_size=2)
    assert found.max_abs_difference < 1e-4 and found.reference_std > 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("decoder.block.1.layer.1.EncDecAttention.k.weight", "decoder.block.1.layer.1.EncDecAttention.v.weight"),
        ("encoder.block.2.layer.1.DenseReluDense.wi_0.weight", "encoder.block.2.layer.1.DenseReluDense.wi_1.weight"),
    ],
)
def test_logits_tell_swapped_parts(
    tiny_mt5_hf: Path, tiny_mt5_checkpoint: Path, tmp_path: Path, left: str, right: str
) -> None:
    for path in tiny_mt5_hf.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors[left], tensors[right] = tensors[right], tensors[left]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = compare_logits(tiny_mt5_checkpoint, tmp_path, parallel=ParallelConfig(), world_size=1)
    assert not found.within_tolerance and found.max_abs_difference > 0.01


def test_the_verbs(tiny_mt5_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    checkpoint, exported = str(tmp_path / "checkpoint"), str(tmp_path / "exported")
    assert main(["import", "--hf", str(tiny_mt5_hf), "--output", checkpoint]) == ExitCode.DONE
    assert main(["export", "--checkpoint", checkpoint, "--output", exported, "--dtype", "bf16"]) == ExitCode.DONE
    assert main(["verify", "--checkpoint", checkpoint, "--hf", exported]) == ExitCode.DONE
    tensors = safetensors.torch.load_file(f"{exported}/model.safetensors")
    tensors["encoder.final_layer_norm.weight"] += torch.tensor(0.25, dtype=torch.bfloat16)
    safetensors.torch.save_file(tensors, f"{exported}/model.safetensors", metadata={"format": "pt"})
    assert main(["verify", "--checkpoint", checkpoint, "--hf", exported]) == ExitCode.FAILED
