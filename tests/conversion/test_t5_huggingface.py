"""mT5, T5 v1.1 and T5 1.0: fused tensors are what a hand-made fusion gives, and come back bit by bit."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForSeq2SeqLM

from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader, check_safe
from megatron_xmtf.conversion import checkpoint_parts, huggingface_export, tensor_source
from megatron_xmtf.conversion.embedding_copies import directory_architecture
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.safetensors_file import plan_shards
from megatron_xmtf.conversion.verify import compare_weights
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, NonFiniteError, XmtfError
from tests.conversion.test_huggingface import Tensors, edit_config, read_tensors, refuse, rewrite, same_bits
from tests.tiny import T5_SPECIAL, tiny_mt5, tiny_t5, write_tiny_mt5, write_tiny_t5, write_tiny_tokenizer
from tests.torch_dist_files import Chunk, write_training_checkpoint

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "mt5": tiny_mt5,
    "t5-1.1": partial(tiny_t5, "1.1"),
    "t5-1.0": partial(tiny_t5, "1.0"),
}
HEADS, HEAD_DIM, FFN, HIDDEN = 4, 20, 56, 48
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model")
IDS, TARGETS = torch.arange(4, 24)[None], torch.arange(40, 49)[None]
BLOCK = "decoder.block.1.layer.{}"


def write_model(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Tensors:
    """Write a model as `save_pretrained` does, with a tokenizer and a sentencepiece file."""
    MODELS[kind]().to(dtype).save_pretrained(directory, max_shard_size=shard)
    write_tiny_tokenizer(directory, special=T5_SPECIAL)
    (directory / "spiece.model").write_bytes(b"carried, not read \xff")
    return read_tensors(directory)


def fused_by_hand(tensors: Tensors, *, gated: bool) -> Tensors:
    """Fuse some of a model's tensors head by head, in plain loops."""

    def by_head(names: list[str]) -> torch.Tensor:
        rows = []
        for head in range(HEADS):
            for name in names:
                rows += [tensors[name][head * HEAD_DIM + row] for row in range(HEAD_DIM)]
        return torch.stack(rows)

    inside = f"{BLOCK.format(0)}.SelfAttention"
    across = f"{BLOCK.format(1)}.EncDecAttention"
    first = f"{BLOCK.format(2)}.DenseReluDense"
    table = torch.zeros(384, HIDDEN, dtype=tensors["shared.weight"].dtype)
    table[:300] = tensors["shared.weight"]
    gate = [tensors[f"{first}.{name}.weight"] for name in (("wi_0", "wi_1") if gated else ("wi",))]
    return {
        "decoder.layers.1.self_attention.linear_qkv.weight": by_head([f"{inside}.{name}.weight" for name in "qkv"]),
        "decoder.layers.1.self_attention.linear_proj.weight": tensors[f"{inside}.o.weight"],
        "decoder.layers.1.cross_attention.linear_q.weight": tensors[f"{across}.q.weight"],
        "decoder.layers.1.cross_attention.linear_kv.weight": by_head([f"{across}.{name}.weight" for name in "kv"]),
        "decoder.layers.1.pre_cross_attn_layernorm.weight": tensors[f"{BLOCK.format(1)}.layer_norm.weight"],
        "decoder.layers.1.mlp.linear_fc1.weight": torch.cat(gate),
        "decoder.layers.1.mlp.linear_fc2.weight": tensors[f"{first}.wo.weight"],
        "encoder.relative_attention_bias.weight": tensors[
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ],
        "encoder.layers.3.pre_mlp_layernorm.weight": tensors["encoder.block.3.layer.1.layer_norm.weight"],
        "decoder.final_layernorm.weight": tensors["decoder.final_layer_norm.weight"],
        "embedding.word_embeddings.weight": table,
    }


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize(
    ("dtype", "shard", "chunk"),
    # Whole tensors; a few rows of one head; a few heads: the paths of a large model, and files of a few tensors.
    [(torch.float32, "5GB", 256 << 20), (torch.float16, "40KB", 1500), (torch.bfloat16, "40KB", 9000)],
)
def test_round_trip_keeps_every_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype, shard: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_model(tmp_path / "model", kind, dtype=dtype, shard=shard)
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 10 * chunk)
    monkeypatch.setattr(huggingface_export, "plan_shards", partial(plan_shards, shard_bytes=40_000))
    done = import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    assert done.dtype == str(dtype).removeprefix("torch.")
    assert done.parameters == sum(tensor.numel() for tensor in tensors.values())
    by_hand = fused_by_hand(tensors, gated=kind != "t5-1.0")
    with CheckpointReader(tmp_path / "checkpoint") as reader:
        assert same_bits({name: reader.read(name) for name in by_hand}, by_hand)
        assert ("output_layer.weight" in reader.tensors) == (kind != "t5-1.0")
    exported = export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)
    assert (exported.parameters, exported.tensors) == (done.parameters, len(tensors))
    for name in SIDE_FILES:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert compare_weights(tmp_path / "checkpoint", tmp_path / "exported").tensors == len(tensors)
    assert compare_weights(tmp_path / "checkpoint", tmp_path / "exported").identical
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "exported", "model"]


@pytest.mark.parametrize("kind", list(MODELS))
def test_an_export_opens_with_equal_logits(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", kind)
    import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    logits = []
    for directory in (tmp_path / "model", tmp_path / "exported"):
        opened, report = AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            logits.append(opened.eval()(input_ids=IDS, decoder_input_ids=TARGETS).logits)
    assert torch.equal(*logits) and logits[0].std() > 1
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card and "text2text-generation" in card


def test_the_checkpoint_is_whole_and_safe(tiny_mt5_checkpoint: Path) -> None:
    manifest = open_manifest(tiny_mt5_checkpoint)
    verify_hashes(tiny_mt5_checkpoint, manifest)
    check_safe(tiny_mt5_checkpoint)
    assert (manifest.architecture["family"], manifest.architecture["tied_head"]) == ("mt5", False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", "mt5")
    return tmp_path / "model"


def swap(left: str, right: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[left], tensors[right] = tensors[right], tensors[left]

    return change


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (f"{BLOCK.format(0)}.SelfAttention.q.weight", f"{BLOCK.format(0)}.SelfAttention.k.weight"),
        (f"{BLOCK.format(1)}.EncDecAttention.k.weight", f"{BLOCK.format(1)}.EncDecAttention.v.weight"),
        ("encoder.block.2.layer.1.DenseReluDense.wi_0.weight", "encoder.block.2.layer.1.DenseReluDense.wi_1.weight"),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    ],
)
def test_swapped_parts_are_told_by_their_names(model: Path, tmp_path: Path, left: str, right: str) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    tensors = read_tensors(model)
    rewrite(model, swap(left, right))
    found = compare_weights(tmp_path / "checkpoint", model)
    assert sorted(tensor.name for tensor in found.differing) == sorted([left, right])
    assert all(tensor.max_abs_difference > 0.1 for tensor in found.differing)
    import_huggingface(model, tmp_path / "swapped")
    export_huggingface(tmp_path / "swapped", tmp_path / "exported")
    assert not same_bits(read_tensors(tmp_path / "exported"), tensors)


def test_one_bit_of_one_head_is_a_difference(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    name = "decoder.block.2.layer.1.EncDecAttention.v.weight"

    def flip(tensors: Tensors) -> None:
        tensors[name].view(torch.int32)[-1, -1] ^= 1

    rewrite(model, flip)
    assert [tensor.name for tensor in compare_weights(tmp_path / "checkpoint", model).differing] == [name]


def test_a_sharded_training_checkpoint_is_exported(model: Path, tmp_path: Path) -> None:
    """Chunks as two tensor-parallel ranks hold them; of the gated layer each rank has a part of both halves."""
    import_huggingface(model, tmp_path / "checkpoint")
    architecture = open_manifest(tmp_path / "checkpoint").architecture

    def chunks() -> Iterator[Chunk]:
        with CheckpointReader(tmp_path / "checkpoint") as reader:
            for name in reader.tensors:
                whole = reader.read(name)
                dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight", "bias.weight")) else 0
                for number, part in enumerate(whole.chunk(4 if "linear_fc1" in name else 2, dim=dim)):
                    offsets = [0] * whole.dim()
                    offsets[dim] = number * part.size(dim)
                    yield name, part, offsets, whole.shape
                yield f"optimizer.state.exp_avg.{name}", whole, [0] * whole.dim(), whole.shape

    write_training_checkpoint(
        tmp_path / "run" / "checkpoints" / "step_0000007",
        chunks(),
        hf=tmp_path / "checkpoint" / "hf",
        step=7,
        architecture=architecture,
        dtype="float32",
        config=None,
        consumed_rows=56,
        contents=["model", "optimizer", "rng"],
    )
    assert export_huggingface(tmp_path / "run", tmp_path / "exported").step == 7
    assert same_bits(read_tensors(tmp_path / "exported"), read_tensors(model))


def test_pickled_weights_with_every_copy_of_the_embedding(tmp_path: Path) -> None:
    """As published before safetensors: one .bin whose three tables and head are the same memory."""
    tensors = write_model(tmp_path / "model", "t5-1.0")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)}
    copies = dict.fromkeys(names, tensors["shared.weight"])
    torch.save({**tensors, **copies, **unused}, tmp_path / "model" / "pytorch_model.bin")
    import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)


def test_an_embedding_under_its_other_name_is_found(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)
    rewrite(model, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)


def test_the_files_decide_whether_the_head_is_tied(model: Path, tmp_path: Path) -> None:
    """transformers 5 writes tie_word_embeddings=true whatever the model; published mT5 says false."""
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is True
    for tie in (True, False):
        edit_config(model, tie_word_embeddings=tie)
        assert directory_architecture(model).tied_head is False  # type: ignore[union-attr]
    rewrite(model, lambda t: t.update({"lm_head.weight": t["shared.weight"].clone()}))
    assert directory_architecture(model).tied_head is True  # type: ignore[union-attr]
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert read_tensors(tmp_path / "exported").keys() == read_tensors(model).keys() - {"lm_head.weight"}
    opened = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")
    assert opened.lm_head.weight is opened.shared.weight
    (model / "model.safetensors").unlink()
    assert directory_architecture(model).tied_head is False  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.pop(f"{BLOCK.format(0)}.SelfAttention.k.weight"),
            CheckpointError,
            r"missing \(1\): .*Attention.k",
        ),
        (lambda t: t.pop("shared.weight"), CheckpointError, r"missing \(1\): shared.weight"),
        (lambda t: t.pop("lm_head.weight"), None, ""),
        (lambda t: t.update({"score.weight": torch.ones(2)}), CheckpointError, r"unexpected \(1\): score.weight"),
        (
            lambda t: t.update({f"{BLOCK.format(0)}.SelfAttention.q.bias": torch.ones(80)}),
            CheckpointError,
            r"unexpected \(1\): .*q.bias",
        ),
        (
            lambda t: t.update({f"{BLOCK.format(0)}.SelfAttention.v.weight": torch.ones(48, 48)}),
            CheckpointError,
            r"SelfAttention.v.weight is \[48, 48\] instead of \[80, 48\]",
        ),
        (lambda t: t.update({"shared.weight": torch.tensor(1.0)}), CheckpointError, r"shared.weight is \[\] instead"),
        (
            lambda t: t.update({"decoder.embed_tokens.weight": t["shared.weight"] + 1}),
            CheckpointError,
            "decoder.embed_tokens.weight differs from shared.weight",
        ),
        (
            lambda t: t[f"{BLOCK.format(2)}.DenseReluDense.wi_1.weight"][3, 3].fill_(torch.nan),
            NonFiniteError,
            "wi_1.weight holds NaN or Inf",
        ),
        (
            lambda t: t.update(
                {f"{BLOCK.format(0)}.SelfAttention.q.weight": t[f"{BLOCK.format(0)}.SelfAttention.q.weight"].half()}
            ),
            CheckpointError,
            "q.weight is float16, .*k.weight is float32.*--dtype",
        ),
    ],
)
def test_wrong_tensors_are_named(
    model: Path, change: Callable[[Tensors], object], error: type[XmtfError] | None, message: str
) -> None:
    rewrite(model, change)
    if error is None:  # transformers ties a head that is not there, and so is it here
        import_huggingface(model, model.parent / "checkpoint")
    else:
        refuse(model, error, message)


def test_parts_of_several_types_become_one_on_request(model: Path, tmp_path: Path) -> None:
    name = f"{BLOCK.format(0)}.SelfAttention.q.weight"
    rewrite(model, lambda t: t.update({name: t[name].half()}))
    tensors = read_tensors(model)
    import_huggingface(model, tmp_path / "checkpoint", dtype=torch.bfloat16)
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    expected = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert same_bits(read_tensors(tmp_path / "exported"), expected)


def test_whole_tensors_keep_types_of_their_own(model: Path, tmp_path: Path) -> None:
    """transformers keeps the last layer of T5's feed-forward in fp32 (`_keep_in_fp32_modules`)."""
    rewrite(model, lambda t: t.update({k: v.half() for k, v in t.items() if not k.endswith("wo.weight")}))
    tensors = read_tensors(model)
    assert import_huggingface(model, tmp_path / "checkpoint").dtype == "mixed"
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, "feed_forward_proj='gated-silu' is not offered"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}, r"missing \(7\): .*wi.weight"),
        ({"is_gated_act": False}, "is_gated_act=False contradicts feed_forward_proj='gated-gelu'"),
        ({"num_decoder_layers": 4}, r"missing \(14\)"),
        ({"num_decoder_layers": None}, r"missing \(14\)"),
        ({"num_heads": 5}, r"q.weight is \[80, 48\] instead of \[100, 48\]"),
        ({"vocab_size": 301}, r"shared.weight is \[300, 48\] instead of \[301, 48\]"),
        ({"model_type": "umt5"}, "model_type 'umt5' has no family here; nearest: mt5"),
        ({"is_encoder_decoder": False}, "only whole encoder-decoders"),
    ],
)
def test_config_that_does_not_fit(model: Path, changes: dict[str, object], message: str) -> None:
    edit_config(model, **changes)
    refuse(model, CheckpointError, message)


def test_another_model_is_told_apart(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    write_tiny_mt5(tmp_path / "deeper", decoder_layers=4)
    with pytest.raises(CheckpointError, match="num_decoder_layers=3.*num_decoder_layers=4"):
        compare_weights(tmp_path / "checkpoint", tmp_path / "deeper")
    write_tiny_t5(tmp_path / "tied", version="1.0")
    with pytest.raises(CheckpointError, match="tied_head=False.*tied_head=True"):
        compare_weights(tmp_path / "checkpoint", tmp_path / "tied")


def test_a_damaged_checkpoint_leaves_nothing(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="bytes instead of"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_names_of_every_tensor_are_transformers(tmp_path: Path) -> None:
    """safetensors' own reader and transformers' state_dict agree with what is written."""
    write_model(tmp_path / "model", "mt5")
    import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    written = safetensors.torch.load_file(tmp_path / "exported" / "model.safetensors")
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert written.keys() == tiny_mt5().state_dict().keys() - copies
