"""torch_dist checkpoints of Megatron-Core that hold a BLOOM become ours bit by bit; other GPTs are refused by name."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_xmtf.checkpoint.sharded import load_model_weights
from megatron_xmtf.cli import main
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.conversion import tensor_source
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.megatron_core import import_megatron
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingError
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.tiny import tiny_bloom, write_tiny_tokenizer

Tensors = dict[str, torch.Tensor]
HIDDEN, LAYERS, HEADS = 32, 4, 4
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def bloom_settings(**changes: Any) -> argparse.Namespace:
    values = {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": 4 * HIDDEN,
        "kv_channels": HIDDEN // HEADS,
        "position_embedding_type": "alibi",
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": False,
        "group_query_attention": False,
        "layernorm_epsilon": 1e-5,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**{**values, **changes})


def save_in_rank(checkpoint: Path, target: Path, sizes: dict[str, int], stacked: bool, fused: bool) -> None:
    """Save as Megatron-LM does: Megatron-Core's own `sharded_state_dict` and `dist_checkpointing.save`."""
    from megatron.core import dist_checkpointing

    parallel = ParallelConfig(**sizes)
    initialize_parallel(parallel, seed=1)
    architecture = BloomArchitecture(hidden_size=HIDDEN, num_layers=LAYERS, num_attention_heads=HEADS, vocab_size=300)
    [chunk] = build_model(architecture, parallel=parallel)
    load_model_weights([chunk], checkpoint)
    if fused:
        for layer in chunk.decoder.layers:
            layer.submodules_config.sharded_state_dict_keys_map = FUSED
    state = {"model": chunk.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})}
    common = {"args": bloom_settings(), "checkpoint_version": 3.0, "iteration": 70}
    dist_checkpointing.save({**state, **common}, str(target))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_bloom(hidden_size=HIDDEN, layers=LAYERS, heads=HEADS).save_pretrained(root / "hf")
    write_tiny_tokenizer(root / "hf")
    import_huggingface(root / "hf", root / "checkpoint")
    return root


def save(model: Path, target: Path, *, tp: int = 1, pp: int = 1, stacked: bool = True, fused: bool = True) -> Path:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    target.mkdir(parents=True)
    arguments = (model / "checkpoint", target, sizes, stacked, fused)
    run_ranks(save_in_rank, world_size=tp * pp, arguments=arguments)
    return target


def exported(checkpoint: Path) -> Tensors:
    export_huggingface(checkpoint, checkpoint.with_name("exported"))
    return safetensors.torch.load_file(checkpoint.with_name("exported") / "model.safetensors")


def assert_same_model(checkpoint: Path, model: Path) -> None:
    found, wanted = exported(checkpoint), safetensors.torch.load_file(model / "hf" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)


def refuse(source: Path, error: type[Exception], message: str, **options: Any) -> None:
    output = source.parent / "out" / "checkpoint"
    with pytest.raises(error, match=message):
        import_megatron(source, output, **options)
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("tp", "pp", "stacked", "fused"),
    [(2, 2, True, True), (1, 2, True, False), (2, 1, False, True), (1, 1, False, False)],
)
def test_every_spelling_keeps_every_bit(
    model: Path, tmp_path: Path, tp: int, pp: int, stacked: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(model, tmp_path / "run" / "iter_0000070", tp=tp, pp=pp, stacked=stacked, fused=fused)
    (source.parent / "latest_checkpointed_iteration.txt").write_text("70")
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 900)
    done = import_megatron(source.parent, tmp_path / "checkpoint", vocab_size=300, tokenizer=model / "hf")
    # Megatron's table has 384 rows, 84 of them padding: it does not say how many words there are.
    assert (done.iteration, done.tensors, done.dropped_vocabulary_rows) == (70, 53, 84)
    assert_same_model(tmp_path / "checkpoint", model)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_stacked_layers_are_what_is_tested(model: Path, tmp_path: Path) -> None:
    """The stored names and shapes, read with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader

    source = save(model, tmp_path / "source", tp=2, pp=2)
    stored = FileSystemReader(source).read_metadata().state_dict_metadata
    assert stored["decoder.layers.self_attention.linear_qkv.weight"].size == (4, 96, 32)
    assert stored["decoder.layers.mlp.linear_fc1.layer_norm_weight"].size == (4, 32)
    assert stored["embedding.word_embeddings.weight"].size == (384, 32)
    chunks = stored["decoder.layers.mlp.linear_fc2.weight"].chunks
    assert {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks} == {
        ((layer, 0, column), (1, 32, 64)) for layer in range(4) for column in (0, 64)
    }


def test_the_verb_and_a_config_of_ones_own(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(model, tmp_path / "source")
    (source / "common.pt").unlink()
    refuse(source, MissingError, "common.pt does not exist")
    words = ["import", "--megatron", str(source), "--output", str(tmp_path / "checkpoint"), "--json"]
    assert main([*words, "--config", str(model / "hf")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dropped_vocabulary_rows"] == 84 and report["iteration"] is None
    assert_same_model(tmp_path / "checkpoint", model)
    assert main([*words, "--replicas", "first"]) == 2
    assert "--replicas: of no use with this source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope', not 'alibi'"),
        ({"position_embedding_type": "learned_absolute"}, "'learned_absolute', not 'alibi'"),
        ({"normalization": "RMSNorm", "swiglu": True}, "normalization is 'RMSNorm', not 'LayerNorm'; swiglu is True"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights is True"),
        ({"ffn_hidden_size": 96}, "ffn_hidden_size is 96, not 128"),
        ({"bias_gelu_fusion": False}, "GELU is the exact one"),
        ({"num_layers": 3}, r"instead of \[3, 32\]"),
        ({"hidden_size": None}, "has no `args`"),
    ],
)
def test_settings_that_are_no_blooms(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = save(model, tmp_path / "source") if "num_layers" in changes else tmp_path / "source"
    if "num_layers" not in changes:
        source.mkdir()
        (source / ".metadata").touch()
    torch.save({"args": bloom_settings(**changes), "iteration": 1}, source / "common.pt")
    refuse(source, CheckpointError, message)


def save_plain_gpt(target: Path, position: str) -> None:
    """Save a GPTModel of Megatron-Core itself, which is no BLOOM."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    initialize_parallel(ParallelConfig(), seed=1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, use_cpu_initialization=True
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=384,
        max_sequence_length=16,
        position_embedding_type=position,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=True,
    )
    common = {"args": bloom_settings(position_embedding_type=position), "iteration": 5}
    dist_checkpointing.save({"model": gpt.sharded_state_dict(), **common}, str(target))


@pytest.mark.parametrize(
    ("position", "named"),
    [("learned_absolute", r"unexpected \(1\): embedding.position_embeddings.weight"), ("rope", r"unexpected \(0\)")],
)
def test_a_plain_gpt_is_refused_by_settings_and_by_tensors(
    model: Path, tmp_path: Path, position: str, named: str
) -> None:
    (tmp_path / "gpt").mkdir()
    run_ranks(save_plain_gpt, world_size=1, arguments=(tmp_path / "gpt", position))
    refuse(tmp_path / "gpt", CheckpointError, f"no BLOOM: position_embedding_type is '{position}', not 'alibi'")
    missing = r"missing \(2\): embedding.layernorm.weight, embedding.layernorm.bias"
    refuse(tmp_path / "gpt", CheckpointError, f"{missing}; {named}", config=model / "hf")


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def test_crafted_files_do_not_run(model: Path, tmp_path: Path) -> None:
    import pickle

    source, canary = save(model, tmp_path / "source"), tmp_path / "canary"
    torch.save({"args": Payload(canary)}, source / "common.pt")
    refuse(source, CorruptCheckpointError, "common.pt is refused: it names posix.mkdir")
    (source / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    refuse(source, CorruptCheckpointError, ".metadata is refused", config=model / "hf")
    assert not canary.exists()


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    refuse(tmp_path / "run", MissingError, "it is no torch_dist checkpoint")
    tracker.write_text("../../etc")
    refuse(tmp_path / "run", CheckpointError, "instead of a number of iterations")
    tracker.write_text("12")
    refuse(tmp_path / "run", MissingError, "iter_0000012 does not exist")
    (tmp_path / "run" / "iter_0000012").mkdir()
    refuse(tmp_path / "run", MissingError, "holds no .metadata")


def test_too_few_words(model: Path, tmp_path: Path) -> None:
    refuse(save(model, tmp_path / "source"), ConfigError, "has 384 rows, vocab_size is 385", vocab_size=385)
