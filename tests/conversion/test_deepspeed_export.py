"""Layer files that we write are what BigScience's converters read, and come back bit by bit."""

import json
import pickletools
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.cli import main
from megatron_xmtf.conversion import deepspeed_export
from megatron_xmtf.conversion.deepspeed import import_deepspeed
from megatron_xmtf.conversion.deepspeed_export import export_deepspeed
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.torch_file import check_bytes
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError
from tests.conversion import deepspeed_files as files
from tests.conversion.deepspeed_files import Tensors
from tests.tiny import tiny_bloom, write_tiny_mt5, write_tiny_tokenizer

LAYERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bf16 model and its checkpoint beside it."""
    root = tmp_path_factory.mktemp("model")
    bloom = tiny_bloom(hidden_size=files.HIDDEN, layers=LAYERS, heads=files.HEADS).bfloat16()
    bloom.save_pretrained(root / "hf")
    write_tiny_tokenizer(root / "hf")
    import_huggingface(root / "hf", root / "checkpoint")
    return root


def hf_tensors(directory: Path) -> Tensors:
    return safetensors.torch.load_file(directory / "model.safetensors")


def merged_as_theirs(step: Path, tp: int) -> Tensors:
    """Merge layer files by the rules of `transformers`' converter for BLOOM: names, averages, dimensions."""
    found: Tensors = {}
    for path in sorted(step.glob("layer_*-model_00-*")):
        number = int(re.fullmatch(r"layer_(\d\d)-.*", path.name)[1])  # type: ignore[index]
        parts = [
            torch.load(path.with_name(path.name.replace("model_00", f"model_{rank:02d}")), weights_only=True)
            for rank in range(tp)
        ]
        for key in parts[0]:
            names = {"weight": "ln_f.weight", "bias": "ln_f.bias", "word_embeddings.weight": "word_embeddings.weight"}
            name = names.get(key, f"h.{number - 3}.{key}")
            if key.startswith("word_embeddings.norm"):
                name = key.replace("word_embeddings.norm", "word_embeddings_layernorm")
            if name.endswith(("norm.weight", "norm.bias", "dense.bias", "4h_to_h.bias", "ln_f.weight", "ln_f.bias")):
                found[name] = sum(part[key] for part in parts) / tp
            else:
                dim = 1 if "dense_4h_to_h.weight" in name or "self_attention.dense.weight" in name else 0
                found[name] = torch.cat([part[key] for part in parts], dim=dim)
    return {f"transformer.{name}": tensor for name, tensor in found.items()}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3), (4, 1), (12, 2)])
def test_their_rules_give_the_model_back(
    model: Path, tmp_path: Path, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_export, "CHUNK_BYTES", 700)
    done = export_deepspeed(
        model / "checkpoint", tmp_path / "theirs", tensor_parallel_size=tp, pipeline_parallel_size=pp
    )
    step = tmp_path / "theirs" / (tmp_path / "theirs" / "latest").read_text()
    expected = {f"layer_{n:02d}-model_{rank:02d}-model_states.pt" for n in (1, 3, 4, 5, 7) for rank in range(tp)}
    expected |= {f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tp * pp)}
    assert {path.name for path in step.iterdir()} == expected
    assert (done.layer_files, done.padded_vocab_size, done.dtype) == (5 * tp, 300, "bfloat16")
    for path in step.glob("layer*"):
        check_bytes(path)
        tensors = torch.load(path, weights_only=True)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors.values()), "no other tensor's bytes"
    if tp <= 4:  # twelve equal bf16 numbers summed one by one are not twelve times the number
        merged, wanted = merged_as_theirs(step, tp), hf_tensors(model / "hf")
        assert merged.keys() == wanted.keys()
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert main(["import", "--deepspeed", str(tmp_path / "theirs"), "--output", str(tmp_path / "back")]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "back"), "--output", str(tmp_path / "hf")]) == 0
    back, wanted = hf_tensors(tmp_path / "hf"), hf_tensors(model / "hf")
    assert back.keys() == wanted.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], wanted[name]) for name in wanted)


def test_settings_name_their_classes_and_no_others(model: Path, tmp_path: Path) -> None:
    export_deepspeed(model / "checkpoint", tmp_path / "theirs", tensor_parallel_size=2)
    with zipfile.ZipFile(tmp_path / "theirs" / "global_step0" / "mp_rank_01_model_states.pt") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    named = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    assert named == {
        "argparse Namespace",
        "megatron.enums PositionEmbeddingType",
        "torch bfloat16",
        "__builtin__ set",
    }
    assert (tmp_path / "theirs" / "hf" / "tokenizer.json").is_file()


def test_a_prefix_lm_stays_one(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "prefix_lm": True}))
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    export_deepspeed(tmp_path / "checkpoint", tmp_path / "theirs")
    import_deepspeed(tmp_path / "theirs", tmp_path / "back")
    assert attends_prefix(tmp_path / "back", open_manifest(tmp_path / "back"))
    assert not attends_prefix(model / "checkpoint", open_manifest(model / "checkpoint"))


def test_a_vocabulary_that_ranks_cannot_share_is_padded(model: Path, tmp_path: Path) -> None:
    """300 rows for 8 ranks' sake become 1,024: Megatron's multiple of 128 x 8; 6 of 12 heads would not divide."""
    bloom = tiny_bloom(hidden_size=64, layers=2, heads=8)
    bloom.save_pretrained(tmp_path / "hf")
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    done = export_deepspeed(tmp_path / "checkpoint", tmp_path / "theirs", tensor_parallel_size=8)
    assert done.padded_vocab_size == 1024
    parts = [
        torch.load(tmp_path / "theirs" / "global_step0" / f"layer_01-model_{rank:02d}-model_states.pt")
        for rank in range(8)
    ]
    table = torch.cat([part["word_embeddings.weight"] for part in parts])
    assert torch.equal(table[:300], bloom.transformer.word_embeddings.weight) and not table[300:].any()
    words = ["import", "--deepspeed", str(tmp_path / "theirs"), "--vocab-size", "300", "--json"]
    assert main([*words, "--output", str(tmp_path / "back")]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "back"), "--output", str(tmp_path / "again")]) == 0
    back, wanted = hf_tensors(tmp_path / "again"), hf_tensors(tmp_path / "hf")
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = model / "checkpoint", tmp_path / "theirs"
    with pytest.raises(ConfigError, match="does not divide the model's 12 attention heads"):
        export_deepspeed(checkpoint, output, tensor_parallel_size=5)
    with pytest.raises(ConfigError, match="from 1 to the model's 3 layers"):
        export_deepspeed(checkpoint, output, pipeline_parallel_size=4)
    write_tiny_mt5(tmp_path / "mt5")
    import_huggingface(tmp_path / "mt5", tmp_path / "mt5_checkpoint")
    with pytest.raises(CheckpointError, match="holds a mt5; Megatron-DeepSpeed's layer files are a BLOOM's"):
        export_deepspeed(tmp_path / "mt5_checkpoint", output)
    words = ["export", "--checkpoint", str(checkpoint), "--output", str(output), "--tensor-parallel", "2"]
    assert main(words) == 2 and "belong to --format deepspeed" in capsys.readouterr().err
    assert not output.exists()
    assert main([*words, "--format", "deepspeed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_files"] == 10
    with pytest.raises(ConfigError, match="exists already"):
        export_deepspeed(checkpoint, output)
    words = ["import", "--hf", str(model / "hf"), "--output", str(tmp_path / "c"), "--vocab-size", "9"]
    assert main(words) == 2 and "--vocab-size: of no use with this source" in capsys.readouterr().err


def test_a_damaged_checkpoint_leaves_nothing(model: Path, tmp_path: Path) -> None:
    import_huggingface(model / "hf", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="bytes instead of"):
        export_deepspeed(tmp_path / "checkpoint", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
