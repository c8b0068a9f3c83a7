"""AlexaTM and `transformers` Blenderbot with three tables: bit by bit, equal logits, and an error where they differ."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BlenderbotConfig, BlenderbotForConditionalGeneration

from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.conversion import checkpoint_parts, huggingface_export, tensor_source
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.safetensors_file import plan_shards
from megatron_xmtf.conversion.verify import compare_weights
from megatron_xmtf.conversion.verify_logits import compare_logits
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.alexatm_config import alexatm_from_hf, alexatm_to_hf
from tests.conversion.test_huggingface import Tensors, edit_config, read_tensors, refuse, rewrite, same_bits
from tests.models.test_encoder_decoder_alexatm import by_our_names
from tests.tiny import tiny_alexatm, write_tiny_tokenizer

SHARED, ENCODER, DECODER, HEAD = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
IDS, TARGETS = torch.arange(4, 24)[None], torch.arange(40, 49)[None]
TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"


def write_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> Tensors:
    """Write a model as `save_pretrained` does, with a tokenizer."""
    tiny_alexatm().to(dtype).save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return read_tensors(directory)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


def test_transformers_keeps_three_tables_and_reads_no_fourth(model: Path) -> None:
    """What the whole export rests on, asked of the library alone."""
    tensors = read_tensors(model)
    assert len({tensors[name].sum().item() for name in (SHARED, ENCODER, DECODER, HEAD)}) == 4
    opened = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    assert type(opened) is BlenderbotForConditionalGeneration
    state = opened.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in (SHARED, ENCODER, DECODER, HEAD))
    with torch.no_grad():
        before = opened(input_ids=IDS, decoder_input_ids=TARGETS).logits
        for name, is_read in ((SHARED, False), (ENCODER, True), (DECODER, True), (HEAD, True)):
            opened.get_parameter(name).add_(torch.linspace(0, 1, 48))
            after = opened(input_ids=IDS, decoder_input_ids=TARGETS).logits
            assert torch.equal(before, after) is not is_read, name
            before = after


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 256 << 20), (torch.bfloat16, 1500)])
def test_round_trip_keeps_every_bit(
    tmp_path: Path, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_model(tmp_path / "model", dtype=dtype)
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 10 * chunk)
    monkeypatch.setattr(huggingface_export, "plan_shards", partial(plan_shards, shard_bytes=40_000))
    done = import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    by_hand = by_our_names(tensors)
    table = tensors[HEAD]
    by_hand["output_layer.weight"] = torch.cat([table, table.new_zeros(84, 48)])
    with CheckpointReader(tmp_path / "checkpoint") as reader:
        assert same_bits({name: reader.read(name) for name in reader.tensors}, by_hand)
    exported = export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    written = read_tensors(tmp_path / "exported")
    assert torch.equal(written.pop(SHARED), tensors[ENCODER])
    kept = {name: tensor for name, tensor in tensors.items() if name not in (SHARED, "final_logits_bias")}
    assert same_bits(written, kept)
    assert exported.parameters == done.parameters == sum(tensor.numel() for tensor in kept.values())
    assert done.parameters == alexatm_from_hf(json.loads((tmp_path / "model/config.json").read_text())).parameter_count
    assert compare_weights(tmp_path / "checkpoint", tmp_path / "exported").identical
    assert compare_weights(tmp_path / "checkpoint", tmp_path / "model").identical
    import_huggingface(tmp_path / "exported", tmp_path / "again")
    with CheckpointReader(tmp_path / "again") as reader:
        assert same_bits({name: reader.read(name) for name in reader.tensors}, by_hand)


def test_an_export_opens_without_a_report_and_with_equal_logits(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    logits = []
    for directory in (model, tmp_path / "exported"):
        opened, report = AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(opened.eval()(input_ids=IDS, decoder_input_ids=TARGETS).logits)
    assert torch.equal(*logits) and logits[0].std() > 1


def test_logits_of_the_engine_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    parallel = ParallelConfig(**{TP: 2, PP: 2, SP: True})  # type: ignore[arg-type]
    found = compare_logits(tmp_path / "checkpoint", model, parallel=parallel, world_size=4)
    assert found.within_tolerance and found.max_abs_difference < 1e-4 and found.reference_std > 1
    assert found.prompts == "fixed multilingual prompts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True: a blenderbot is read where it is an AlexaTM"),
        ({"activation_function": "gelu"}, "activation_function='gelu'"),
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"decoder_ffn_dim": 64}, "encoder_ffn_dim=56 and decoder_ffn_dim=64 must be equal"),
        ({"attention_dropout": 0.1}, "dropout=0.0 and attention_dropout=0.1 must be equal"),
        ({"encoder_attention_heads": 5, "decoder_attention_heads": 5}, "d_model=48 is not a multiple of .*heads=5"),
    ],
)
def test_a_blenderbot_that_is_no_alexatm_is_refused(model: Path, changes: dict[str, object], message: str) -> None:
    edit_config(model, **changes)
    refuse(model, CheckpointError, message)


def test_a_bias_of_logits_that_is_not_zero_is_refused(model: Path) -> None:
    rewrite(model, lambda tensors: tensors["final_logits_bias"][0, 7].fill_(0.5))
    refuse(model, CheckpointError, "final_logits_bias is not zero")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tied_head": True}, "differs: tied_head is True, not False"),
        ({"tied_embeddings": True}, "differs: tied_embeddings is True, not False"),
        ({"norm": "rms", "linear_bias": False}, "norm is 'rms', not 'layernorm'; linear_bias is False, not True"),
        ({"head_dim": 16}, "heads x head_dim is 64, not hidden_size"),
    ],
)
def test_an_error_names_what_blenderbot_cannot_hold(model: Path, changes: dict[str, object], message: str) -> None:
    architecture = alexatm_from_hf(json.loads((model / "config.json").read_text()))
    assert mapping_of(architecture).architecture_class == "BlenderbotForConditionalGeneration"
    with pytest.raises(CheckpointError, match=f"no Hugging Face form: .*{message}"):
        mapping_of(replace(architecture, **changes))  # type: ignore[arg-type]


def test_a_written_config_is_read_back_and_opens(model: Path) -> None:
    architecture = alexatm_from_hf(json.loads((model / "config.json").read_text()))
    written = alexatm_to_hf(replace(architecture, dropout=0.25))
    assert alexatm_from_hf(written) == replace(architecture, dropout=0.25)
    opened = BlenderbotForConditionalGeneration(BlenderbotConfig(**written))
    assert {name for name, _ in opened.named_parameters()} == set(read_tensors(model)) - {"final_logits_bias"}
    assert opened.model.encoder.layer_norm.eps == architecture.layernorm_epsilon
    assert not opened.generation_config.forced_eos_token_id
