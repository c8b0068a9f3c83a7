"""`xmtf verify` says that equal models are equal, at any layout, and names what differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_xmtf.cli import main
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.verify import compare_weights, narrower
from megatron_xmtf.conversion.verify_logits import compare_logits
from megatron_xmtf.errors import CheckpointError, ExitCode
from tests.tiny import tiny_bloom, write_tiny_bloom

QKV = "transformer.h.2.self_attention.query_key_value.weight"


@pytest.fixture(scope="module")
def swapped_hf(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with query and key of one layer exchanged."""
    directory = tmp_path_factory.mktemp("swapped")
    for path in tiny_hf.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    heads, width = 4, tensors[QKV].size(1)
    tensors[QKV] = tensors[QKV].view(heads, 3, -1, width)[:, [1, 0, 2]].reshape(-1, width).contiguous()
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def test_weights_of_an_import_are_identical(tiny_checkpoint: Path, tiny_hf: Path) -> None:
    found = compare_weights(tiny_checkpoint, tiny_hf)
    assert found.identical and found.tensors == 4 * 12 + 5 and found.differing == ()


def test_the_differing_weight_is_named(tiny_checkpoint: Path, swapped_hf: Path) -> None:
    found = compare_weights(tiny_checkpoint, swapped_hf)
    assert not found.identical and [tensor.name for tensor in found.differing] == [QKV]
    assert found.differing[0].max_abs_difference > 0.1


def test_one_bit_is_a_difference(tiny_checkpoint: Path, tiny_hf: Path, tmp_path: Path) -> None:
    export_huggingface(tiny_checkpoint, tmp_path / "hf")
    tensors = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    tensors["transformer.ln_f.bias"].view(torch.int32)[0] ^= 1
    safetensors.torch.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert [t.name for t in compare_weights(tiny_checkpoint, tmp_path / "hf").differing] == ["transformer.ln_f.bias"]


def test_another_type_is_compared_after_rounding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_huggingface(tiny_checkpoint, tmp_path / "hf", dtype=torch.bfloat16)
    found = compare_weights(tiny_checkpoint, tmp_path / "hf")
    assert found.identical and (found.checkpoint_dtype, found.hf_dtype) == ("float32", "bfloat16")
    assert narrower(torch.float32, torch.float16, torch.bfloat16) is torch.bfloat16


def test_another_architecture_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_tiny_bloom(tmp_path / "hf", layers=2)
    with pytest.raises(CheckpointError, match="num_layers=4.*num_layers=2"):
        compare_weights(tiny_checkpoint, tmp_path / "hf")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_logits_are_those_of_transformers(tiny_checkpoint: Path, tiny_hf: Path, tp: int, pp: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    found = compare_logits(tiny_checkpoint, tiny_hf, parallel=parallel, world_size=tp * pp)
    assert found.within_tolerance and found.max_abs_difference < 1e-4
    assert found.reference_std > 1 and found.positions > 300 and found.prompts == "fixed multilingual prompts"


def test_logits_tell_a_swapped_layer(tiny_checkpoint: Path, swapped_hf: Path) -> None:
    found = compare_logits(tiny_checkpoint, swapped_hf, parallel=ParallelConfig(), world_size=1)
    assert not found.within_tolerance and found.max_abs_difference > 0.01


def test_a_directory_without_tokenizer_is_asked_random_ids(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes((tiny_hf / name).read_bytes())
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    found = compare_logits(tmp_path / "checkpoint", tmp_path / "hf", parallel=ParallelConfig(), world_size=1)
    assert found.within_tolerance and found.prompts == "random ids"


def test_the_verbs(
    tiny_hf: Path, swapped_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    checkpoint, exported = str(tmp_path / "checkpoint"), str(tmp_path / "exported")
    assert main(["import", "--hf", str(tiny_hf), "--output", checkpoint, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["tensors"] == 53
    assert main(["export", "--checkpoint", checkpoint, "--output", exported, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    assert main(["verify", "--checkpoint", checkpoint, "--hf", exported, "--json"]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["same"] and found["weights"]["identical"] and found["logits"]["within_tolerance"]
    arguments = ["verify", "--checkpoint", checkpoint, "--hf", str(swapped_hf), "--weights-only"]
    assert main(arguments) == ExitCode.FAILED
    assert "NOT the same model" in capsys.readouterr().out
    assert main(["import", "--hf", str(tiny_hf), "--output", checkpoint]) == ExitCode.USER
    assert main(["import", "--hf", str(tiny_hf), "--output", f"{checkpoint}2", "--dtype", "int8"]) == ExitCode.USER
    assert "dtype 'int8' is not known" in capsys.readouterr().err


def test_verify_ends_where_torch_has_several_threads(tmp_path: Path) -> None:
    # Weights large enough for torch's threads, fp32 beside their bf16: forked ranks must find none of these threads.
    model = tiny_bloom(hidden_size=256, layers=1, vocab_size=640)
    model.save_pretrained(tmp_path / "fp32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    import_huggingface(tmp_path / "fp32", tmp_path / "checkpoint")
    command = [sys.executable, "-m", "megatron_xmtf", "verify", "--checkpoint", str(tmp_path / "checkpoint")]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [*command, "--hf", str(tmp_path / "bf16")], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == ExitCode.DONE and "the same model" in done.stdout, done.stdout + done.stderr
