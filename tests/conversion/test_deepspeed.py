"""BigScience's checkpoints become ours bit by bit at any layout; what is not whole or not harmless is refused."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.conversion import tensor_source
from megatron_xmtf.conversion.deepspeed import import_deepspeed
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingError, NonFiniteError
from tests.conversion import deepspeed_files as files
from tests.conversion.deepspeed_files import Tensors
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return files.hf_tensors()


def back_in_hf(checkpoint: Path) -> Tensors:
    """Export and read with the safetensors library, by the names of `transformers` without prefix."""
    export_huggingface(checkpoint, checkpoint.with_name("exported"))
    found = safetensors.torch.load_file(checkpoint.with_name("exported") / "model.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in found.items()}


def same_bits(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def refuse(source: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Expect a refusal, and nothing at the output or beside it."""
    output = source.parent / "out" / "checkpoint"
    with pytest.raises(error, match=message):
        import_deepspeed(source, output, **options)
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1), (1, 12), (12, 12)])
def test_layer_files_keep_every_bit(
    tmp_path: Path, tensors: Tensors, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "run" / "global_step95000"
    files.write_layers(step, tensors, tp=tp)
    files.write_settings(step, tensors, tp=tp, pp=pp)
    (step.parent / "latest").write_text("global_step95000")
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 1500)  # chunks of a few rows, which do not end where slices do
    done = import_deepspeed(step.parent, tmp_path / "checkpoint")
    assert (done.tensors, done.dtype, done.tensor_parallel_size, done.iteration) == (149, "bfloat16", tp, 95000)
    assert (done.read, done.differing_replicas, done.left_out) == ("layer files", 0, ())
    assert done.parameters == sum(tensor.numel() for tensor in tensors.values())
    verify_hashes(tmp_path / "checkpoint", open_manifest(tmp_path / "checkpoint"))
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), {name: t.bfloat16() for name, t in tensors.items()})
    assert "deepspeed" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_kept(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    files.write_layers(tmp_path / "step", tensors, tp=2, dtype=dtype)
    files.write_settings(tmp_path / "step", tensors, tp=2, pp=1)
    import_deepspeed(tmp_path / "step", tmp_path / "checkpoint")
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), {name: t.to(dtype) for name, t in tensors.items()})


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "prefix"), [(1, 1, 1, "bf16_"), (2, 2, 3, "bf16_"), (1, 12, 11, "bf16_"), (4, 1, 11, "")]
)
def test_fp32_weights_of_the_optimizer(
    tmp_path: Path, tensors: Tensors, tp: int, pp: int, dp: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "global_step7"
    files.write_layers(step, tensors, tp=tp)
    files.write_settings(step, tensors, tp=tp, pp=pp)
    files.write_optimizer(step, tensors, tp=tp, pp=pp, dp=dp, prefix=prefix)
    stored = import_deepspeed(step, tmp_path / "stored")
    assert stored.dtype == "bfloat16" and stored.left_out == ("fp32 weights and moments of the optimizer",)
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 1500)
    done = import_deepspeed(step, tmp_path / "checkpoint", weights="fp32")
    assert (done.dtype, done.read, done.left_out) == ("float32", "zero files", ("moments of the optimizer",))
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), tensors)


def test_a_universal_checkpoint(tmp_path: Path, tensors: Tensors) -> None:
    files.write_universal(tmp_path / "run" / "global_step7_universal", tensors)
    files.write_settings(tmp_path / "run" / "global_step7_universal", tensors, tp=4, pp=12)
    (tmp_path / "run" / "latest_universal").write_text("global_step7_universal\n")
    done = import_deepspeed(tmp_path / "run", tmp_path / "checkpoint")
    assert (done.dtype, done.read, done.tensors) == ("float32", "universal", 149)
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), tensors)
    import_deepspeed(tmp_path / "run", tmp_path / "half", dtype=torch.bfloat16)
    assert open_manifest(tmp_path / "half").dtype == "bfloat16"


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 11), (1, 2, 23)])
def test_fragments_of_many_data_parallel_ranks(tmp_path: Path, tensors: Tensors, tp: int, pp: int, dp: int) -> None:
    """Oracle of the need for it: their tool's own glob finds fewer stretches than there are."""
    step = tmp_path / "step"
    files.write_fragments(step, tensors, tp=tp, pp=pp, dp=dp)
    files.write_settings(step, tensors, tp=tp, pp=pp)
    assert len(list(step.glob("tmp/*/0/fp32.0*"))) < len(list(step.glob("tmp/*/0/fp32.*")))
    done = import_deepspeed(step, tmp_path / "checkpoint")
    assert (done.read, done.tensor_parallel_size) == ("fragments", tp)
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), tensors)


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        (1, MissingError, r"4h.weight/0: of fp32 there are the data-parallel ranks \[\d+, \d+, .*; some are missing"),
        (-1, CheckpointError, r"mlp.dense_h_to_4h.weight in fp32.\d+ is \[\d+\] instead of \[9216\]"),
    ],
)
def test_a_missing_fragment(tmp_path: Path, tensors: Tensors, which: int, error: type[Exception], message: str) -> None:
    files.write_fragments(tmp_path / "step", tensors, tp=1, pp=1, dp=97)
    files.write_settings(tmp_path / "step", tensors, tp=1, pp=1)
    sorted((tmp_path / "step" / "tmp" / "7.mlp.dense_h_to_4h.weight" / "0").glob("fp32.*"))[which].unlink()
    refuse(tmp_path / "step", error, message)


@pytest.mark.parametrize("tp", [2, 4])
def test_copies_that_drifted_become_the_published_average(tmp_path: Path, tensors: Tensors, tp: int) -> None:
    """Oracle: the arithmetic of `transformers`' converter, `tensors[key] += temp[key]`, then `/ pretraining_tp`."""
    step, name = tmp_path / "step", "h.3.input_layernorm.weight"
    files.write_layers(step, tensors, tp=tp)
    files.write_settings(step, tensors, tp=tp, pp=1)
    generator = torch.Generator().manual_seed(3)
    copies = []
    for rank in range(tp):
        path = step / f"layer_06-model_{rank:02d}-model_states.pt"
        state = torch.load(path, weights_only=True)
        state["input_layernorm.weight"] += (torch.randn(files.HIDDEN, generator=generator) * 0.02).bfloat16()
        copies.append(state["input_layernorm.weight"])
        torch.save(state, path)
    expected = copies[0].clone()
    for copy in copies[1:]:
        expected += copy
    expected = expected / tp
    done = import_deepspeed(step, tmp_path / "checkpoint")
    assert done.differing_replicas == 1
    assert done.max_replica_drift == max(float((c.float() - copies[0].float()).abs().max()) for c in copies)
    assert done.worst_replica == "6.input_layernorm.weight in layer_06-model_00-model_states.pt"
    wanted = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert same_bits(back_in_hf(tmp_path / "checkpoint"), {**wanted, name: expected})
    import_deepspeed(step, tmp_path / "first" / "checkpoint", replicas="first")
    assert same_bits(back_in_hf(tmp_path / "first" / "checkpoint"), {**wanted, name: copies[0]})
    refuse(step, CheckpointError, r"6.input_layernorm.weight differs between tensor-parallel ranks", replicas="refuse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_copies_of_every_half_precision_number_are_their_average(dtype: torch.dtype) -> None:
    """What the published converter computes for 1, 2 and 4 equal copies is the copy, so neither rule changes it."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = bits[bits.abs() <= torch.finfo(dtype).max / 4]
    for ranks in (1, 2, 4):
        total = numbers.clone()
        for _ in range(ranks - 1):
            total += numbers
        assert torch.equal(total / ranks, numbers)


def test_rows_of_padding_are_kept_or_dropped(tmp_path: Path, tensors: Tensors) -> None:
    step = tmp_path / "step"
    files.write_layers(step, tensors, tp=2)
    files.write_settings(step, tensors, tp=2, pp=1)
    assert import_deepspeed(step, tmp_path / "all").dropped_vocabulary_rows == 0
    done = import_deepspeed(step, tmp_path / "checkpoint", vocab_size=291)
    assert done.dropped_vocabulary_rows == 9
    exported = back_in_hf(tmp_path / "checkpoint")
    assert torch.equal(exported["word_embeddings.weight"], tensors["word_embeddings.weight"][:291].bfloat16())
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == 291
    refuse(step, CheckpointError, "has 300 rows and vocab_size is 301", vocab_size=301)


def test_config_and_tokenizer_of_ones_own(tmp_path: Path, tensors: Tensors) -> None:
    step, model = tmp_path / "step", tmp_path / "model"
    files.write_layers(step, tensors, tp=2)
    refuse(step, CheckpointError, r"does not say what the model is.*--config")
    write_tiny_tokenizer(model)
    config = {"model_type": "bloom", "n_embed": 48, "n_layer": 12, "n_head": 12, "vocab_size": 300, "special": "ü"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "generation_config.json").write_text("{}")
    import_deepspeed(step, tmp_path / "given", config=model)
    hf = tmp_path / "given" / "hf"
    assert json.loads((hf / "config.json").read_text(encoding="utf-8")) == {**config, "dtype": "bfloat16"}
    assert (hf / "tokenizer.json").is_file() and (hf / "generation_config.json").is_file()
    import_deepspeed(step, tmp_path / "file", config=model / "config.json", tokenizer=model)
    hf = tmp_path / "file" / "hf"
    assert (hf / "tokenizer.json").is_file() and not (hf / "generation_config.json").exists()
    (model / "config.json").write_text(json.dumps({**config, "n_layer": 13}))
    refuse(
        step, CheckpointError, r"missing \(14\): 15.input_layernorm.weight \(layer_15\).*unexpected \(2\)", config=model
    )
    (model / "config.json").write_text(json.dumps({**config, "n_embed": 24}))
    refuse(step, CheckpointError, r"\[24, 48\] instead of \[24, 24\]|instead of", config=model)
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refuse(step, CheckpointError, "only a bloom is stored so", config=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": files.PositionEmbeddingType.absolute}, "position_embedding_type is 2, not 3"),
        ({"embed_layernorm": False}, "embed_layernorm is False, not True"),
        ({"ffn_hidden_size": 128}, "ffn_hidden_size is 128, not 192"),
        ({"glu_activation": "geglu"}, "glu_activation is 'geglu'"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
        ({"bias_gelu_fusion": False}, "bias_gelu_fusion or openai_gelu is False"),
        ({"num_layers": 11}, r"missing \(2\): 15.weight \(layer_15\)"),
        ({"num_attention_heads": 7}, "kv_channels is 4, not 6"),
        ({"hidden_size": None}, "does not say what the model is"),
    ],
)
def test_settings_that_are_no_blooms(tmp_path: Path, tensors: Tensors, changes: Any, message: str) -> None:
    files.write_layers(tmp_path / "step", tensors, tp=1)
    files.write_settings(tmp_path / "step", tensors, tp=1, pp=1, **changes)
    refuse(tmp_path / "step", CheckpointError, message)


@pytest.fixture
def step(tmp_path: Path, tensors: Tensors) -> Path:
    files.write_layers(tmp_path / "run" / "step", tensors, tp=2)
    files.write_settings(tmp_path / "run" / "step", tensors, tp=2, pp=1)
    files.write_optimizer(tmp_path / "run" / "step", tensors, tp=2, pp=1, dp=2)
    return tmp_path / "run" / "step"


def rewrite(path: Path, change: Any) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_missing_layer(step: Path) -> None:
    for rank in range(2):
        (step / f"layer_07-model_{rank:02d}-model_states.pt").unlink()
    refuse(step, CheckpointError, r"missing \(12\): 7.input_layernorm.weight \(layer_07\)")


def test_a_missing_tensor_parallel_part(step: Path) -> None:
    (step / "layer_07-model_01-model_states.pt").unlink()
    refuse(step, MissingError, "1 files of 2 tensor-parallel ranks are missing: layer_07-model_01-model_states.pt")


def test_a_part_that_is_there_twice(step: Path) -> None:
    (step / "layer_7-model_1-model_states.pt").write_bytes((step / "layer_07-model_01-model_states.pt").read_bytes())
    refuse(step, CheckpointError, "layer_07-model_01-model_states.pt and layer_7-model_1-.* are one layer's part twice")


def test_missing_optimizer_files(step: Path) -> None:
    (step / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    refuse(step, MissingError, r"_pp_rank_1_mp_rank_01_optim_states.pt", weights="fp32")
    for path in step.glob("bf16_zero*"):
        path.unlink()
    refuse(step, MissingError, "there are no fp32 weights", weights="fp32")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("mlp.dense_h_to_4h.bias"), CheckpointError, "layer_07-model_01.*dense_h_to_4h.bias"),
        (lambda s: s.update(score=torch.ones(2)), CheckpointError, "layer_07-model_01.*do not hold the same .*score"),
        (
            lambda s: s.update({"input_layernorm.bias": torch.ones(49).bfloat16()}),
            CheckpointError,
            r"7.input_layernorm.bias in layer_07-model_01-model_states.pt is \[49\] instead of \[48\]",
        ),
        (
            lambda s: s.update({"self_attention.dense.weight": s["self_attention.dense.weight"].T.contiguous()}),
            CheckpointError,
            r"7.self_attention.dense.weight in layer_07-model_01-model_states.pt is \[24, 48\] instead of \[48, 24\]",
        ),
        (
            lambda s: s.update({"input_layernorm.bias": s["input_layernorm.bias"].float()}),
            CheckpointError,
            "7.input_layernorm.bias in layer_07-model_01-model_states.pt has type float32",
        ),
        (
            lambda s: s["mlp.dense_h_to_4h.bias"][3].fill_(torch.nan),
            NonFiniteError,
            "7.mlp.dense_h_to_4h.bias in .*layer_07-model_00-model_states.pt holds NaN or Inf",
        ),
        (lambda s: s.update({"input_layernorm.bias": 3}), CorruptCheckpointError, "not a flat dictionary of tensors"),
    ],
)
def test_wrong_tensors_are_named(step: Path, change: Any, error: type[Exception], message: str) -> None:
    rewrite(step / "layer_07-model_01-model_states.pt", change)
    refuse(step, error, message)


@pytest.mark.parametrize("keep", [0, 10, 3000, -1, -30])
def test_a_truncated_file(step: Path, keep: int) -> None:
    path = step / "layer_09-model_01-model_states.pt"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(step, CorruptCheckpointError, "layer_09-model_01-model_states.pt")


@pytest.mark.parametrize("weights", ["stored", "fp32"])
def test_a_flipped_bit_of_a_weight(step: Path, weights: Any) -> None:
    """torch reads a file with a flipped bit without a word; the checksums within the archive tell."""
    stored = "layer_05-model_01-model_states.pt"
    name = stored if weights == "stored" else "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    value = torch.load(step / stored, weights_only=True)["mlp.dense_h_to_4h.weight"].flatten()
    data = bytearray((step / name).read_bytes())
    place = data.find(value[:8].view(torch.uint8).numpy().tobytes()) if weights == "stored" else len(data) // 2
    assert place > 0
    data[place + 5] ^= 16
    (step / name).write_bytes(data)
    if weights == "stored":
        assert not torch.equal(torch.load(step / name, weights_only=True)["mlp.dense_h_to_4h.weight"].flatten(), value)
    named = r"\(mlp.dense_h_to_4h.weight\)" if weights == "stored" else "fp32|exp_avg"
    refuse(step, CorruptCheckpointError, f"{name}.*{named}.* is not as it was written", weights=weights)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "name",
    [
        "layer_01-model_00-model_states.pt",
        "layer_09-model_01-model_states.pt",
        "mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt",
    ],
)
def test_a_crafted_file_does_not_run(step: Path, name: str) -> None:
    canary = step.parent / "canary"
    torch.save({"input_layernorm.weight": Payload(canary), "args": Payload(canary)}, step / name)
    refuse(step, CorruptCheckpointError, f"{name} is refused: it names posix.mkdir", weights="fp32")
    assert not canary.exists()


def test_a_class_of_no_list_is_refused(step: Path) -> None:
    files.save(
        {"args": files.settings(files.hf_tensors(), tp=1, pp=1, odd=files.Unknown())},
        step / "mp_rank_00_model_states.pt",
    )
    refuse(step, CorruptCheckpointError, r"refused: it names deepspeed.somewhere.new.Unknown")


def test_what_others_allow_is_not_allowed_here(step: Path) -> None:
    """torch's list of allowed names is the process's; what stands on it is back afterwards."""
    allowed: Any = (os.mkdir, "shutil.rmtree")
    canary = step.parent / "canary"
    torch.save({"args": Payload(canary)}, step / "mp_rank_00_model_states.pt")
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([allowed, (files.Unknown, "deepspeed.somewhere.new.Unknown")])
    try:
        refuse(step, CorruptCheckpointError, "it names posix.mkdir")
        files.save({"args": files.Unknown()}, step / "mp_rank_00_model_states.pt")
        refuse(step, CorruptCheckpointError, "it names deepspeed.somewhere.new.Unknown")
        assert allowed in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert not canary.exists()


def test_partitions_that_do_not_say_what_they_are(step: Path) -> None:
    path = step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"single_partition_of_fp32_groups": []}}, path)
    refuse(
        step, CheckpointError, r"DeepSpeed before 0.7.0 \(0.7.4 for ZeRO\) wrote it.*--weights stored", weights="fp32"
    )


def test_an_address_outside_of_its_partition(step: Path) -> None:
    flat = {"single_partition_of_fp32_groups": [torch.zeros(8)]}
    mapping = [{"3.input_layernorm.bias": files.fragment_address(numel=9, start=0)}]
    state = {"optimizer_state_dict": {**flat, "param_slice_mappings": mapping}}
    files.save(state, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refuse(step, CorruptCheckpointError, "is said to be 9 numbers from 0 of a partition of 8", weights="fp32")


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp"])
def test_latest_does_not_lead_outside(step: Path, tag: str) -> None:
    (step.parent / "latest").write_text(tag)
    refuse(step.parent, ConfigError, "leads outside|not a plain relative name")


def test_which_checkpoint_is_meant(step: Path, tmp_path: Path) -> None:
    refuse(step.parent, MissingError, "it is no checkpoint of Megatron-DeepSpeed's pipeline")
    (step.parent / "latest").write_text("gone")
    refuse(step.parent, MissingError, "does not exist")
    (step.parent / "latest_universal").write_text("step")
    refuse(step.parent, ConfigError, "two checkpoints")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        import_deepspeed(step, tmp_path / "checkpoint")
