"""Hugging Face -> checkpoint -> Hugging Face keeps every bit; damaged models are `test_corruptions`."""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from megatron_xmtf.checkpoint import reader as reader_module
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader, check_safe
from megatron_xmtf.conversion import checkpoint_parts, finite, huggingface_export, tensor_source
from megatron_xmtf.conversion.deepspeed_export import export_deepspeed
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.safetensors_file import SafetensorsFile, TensorHeader, plan_shards
from megatron_xmtf.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    MissingError,
    NonFiniteError,
    XmtfError,
)
from tests.tiny import tiny_bloom, write_tiny_tokenizer
from tests.torch_dist_files import Chunk, write_training_checkpoint

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(4, 24)[None]


def write_model(directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Tensors:
    """Write a 2-layer model as `save_pretrained` does, with a tokenizer and a chat template."""
    model = tiny_bloom(hidden_size=32, layers=2, heads=4).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    write_tiny_tokenizer(directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }} ✓", encoding="utf-8")
    return read_tensors(directory)


def read_tensors(directory: Path) -> Tensors:
    """Read all tensors with the safetensors library."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(safetensors.torch.load_file(path))
    return found


def same_bits(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a single-file model."""
    tensors = read_tensors(directory)
    change(tensors)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


def refuse(model: Path, error: type[XmtfError], message: str, *, dtype: torch.dtype | None = None) -> None:
    """Expect a refusal, and nothing at the output or beside it."""
    before = sorted(path.name for path in model.parent.iterdir())
    with pytest.raises(error, match=message):
        import_huggingface(model, model.parent / "out" / "checkpoint", dtype=dtype)
    leftovers = [p for p in (model.parent / "out").rglob("*")] if (model.parent / "out").exists() else []
    assert not leftovers
    assert sorted(path.name for path in model.parent.iterdir() if path.name != "out") == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_round_trip_keeps_every_bit(
    tmp_path: Path, dtype: torch.dtype, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_model(tmp_path / "model", dtype=dtype, shard=shard)
    # Chunks of a few rows, and files of a few tensors: the paths that a large model takes.
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 10 * 1500)
    monkeypatch.setattr(huggingface_export, "plan_shards", partial(plan_shards, shard_bytes=40_000))
    done = import_huggingface(tmp_path / "model", tmp_path / "checkpoint")
    assert (done.tensors, done.dtype) == (29, str(dtype).removeprefix("torch."))
    assert done.parameters == sum(tensor.numel() for tensor in tensors.values())
    exported = export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": exported.parameters, "total_size": exported.bytes}
    assert set(index["weight_map"]) == set(tensors)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "exported", "model"]


def test_an_export_opens_with_equal_logits(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    logits = []
    for directory in (model, tmp_path / "exported"):
        opened, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            logits.append(opened.eval()(IDS).logits)
    assert torch.equal(*logits) and logits[0].std() > 0.1
    assert "AutoModelForCausalLM" in (tmp_path / "exported" / "README.md").read_text()


def test_the_checkpoint_is_whole_safe_and_padded_with_zeros(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    manifest = open_manifest(tmp_path / "checkpoint")
    verify_hashes(tmp_path / "checkpoint", manifest)
    check_safe(tmp_path / "checkpoint")
    assert (manifest.step, manifest.contents, manifest.architecture["family"]) == (0, ("model",), "bloom")
    tensors = read_tensors(model)
    with CheckpointReader(tmp_path / "checkpoint") as reader:
        embedding = reader.read("embedding.word_embeddings.weight")
        qkv = reader.read("decoder.layers.1.self_attention.linear_qkv.weight")
    assert embedding.shape == (384, 32) and not embedding[300:].any()
    assert torch.equal(embedding[:300], tensors["transformer.word_embeddings.weight"])
    assert torch.equal(qkv, tensors["transformer.h.1.self_attention.query_key_value.weight"])


def test_one_swapped_layer_is_not_the_same_bits(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)

    def swap(changed: Tensors) -> None:
        name = "transformer.h.0.self_attention.query_key_value.weight"
        changed[name] = changed[name].view(4, 3, 8, 32)[:, [1, 0, 2]].reshape(96, 32)

    rewrite(model, swap)
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert not same_bits(read_tensors(tmp_path / "exported"), tensors)


def test_published_names_without_prefix_come_back_with_it(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)

    def strip(changed: Tensors) -> None:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in changed.items()}
        changed.clear()
        changed.update(bare)

    rewrite(model, strip)
    edit_config(model, architectures=["BloomModel"], n_embed=32)
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"] == ["BloomForCausalLM"]


def test_pickled_weights_are_read_through_the_restricted_loader(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)


def test_a_tied_head_is_accepted_only_bit_identical(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)
    rewrite(model, lambda t: t.update({"lm_head.weight": t["transformer.word_embeddings.weight"].clone()}))
    import_huggingface(model, tmp_path / "checkpoint")
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)
    rewrite(model, lambda t: t["lm_head.weight"][7, 3].add_(1e-3))
    refuse(model, CheckpointError, "lm_head.weight differs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to run"),
        ({"model_type": "llama"}, "model_type 'llama' has no family here; known: blenderbot, bloom, mt5, t5"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"n_layer": 3}, r"missing \(12\)"),
        ({"vocab_size": 301}, r"\[300, 32\] instead of \[301, 32\]"),
    ],
)
def test_config_that_does_not_fit(model: Path, changes: dict[str, object], message: str) -> None:
    (model / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(model, **changes)
    refuse(model, CheckpointError, message)


def test_links_of_the_hugging_face_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abcd", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    import_huggingface(snapshot, tmp_path / "checkpoint")
    hf = tmp_path / "checkpoint" / "hf"
    assert (hf / "tokenizer.json").is_file() and not (hf / "tokenizer.json").is_symlink()


def test_no_weights_and_no_directory(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refuse(model, MissingError, "holds no weights")
    with pytest.raises(MissingError):
        import_huggingface(model / "nowhere", model / "checkpoint")


def test_types_change_on_request(model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model)
    import_huggingface(model, tmp_path / "checkpoint", dtype=torch.bfloat16)
    assert open_manifest(tmp_path / "checkpoint").dtype == "bfloat16"
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported", dtype=torch.float32)
    expected = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    assert same_bits(read_tensors(tmp_path / "exported"), expected)
    import_huggingface(model, tmp_path / "whole")
    export_huggingface(tmp_path / "whole", tmp_path / "half", dtype=torch.float16)
    assert same_bits(read_tensors(tmp_path / "half"), {name: t.half() for name, t in tensors.items()})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_a_weight_that_does_not_fit_the_type(model: Path) -> None:
    rewrite(model, lambda t: t["transformer.ln_f.weight"][0].fill_(1e5))
    refuse(model, NonFiniteError, r"1e\+05 does not fit float16", dtype=torch.float16)


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 200_000, 256_000 - 1])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_one_number_that_is_none_is_found_wherever_it_is(
    tmp_path: Path, place: int, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first, second, last of several pieces that are checked while they are read; import and export."""
    model = tmp_path / "model"
    tiny_bloom(vocab_size=8000, hidden_size=32, layers=1, heads=4).save_pretrained(model)
    write_tiny_tokenizer(model)
    import_huggingface(model, tmp_path / "whole")

    def spoil(tensors: Tensors) -> None:
        tensors["transformer.word_embeddings.weight"].view(-1)[place] = number

    rewrite(model, spoil)
    refuse(model, NonFiniteError, "word_embeddings.weight holds NaN or Inf")
    with monkeypatch.context() as patch:
        patch.setattr(finite, "_finite", lambda _: True)
        import_huggingface(model, tmp_path / "spoiled")
    with pytest.raises(NonFiniteError, match=r"word_embeddings.weight holds NaN or Inf"):
        export_huggingface(tmp_path / "spoiled", tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))
    export_huggingface(tmp_path / "whole", tmp_path / "exported")


def test_mixed_types_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    rewrite(model, lambda t: t.update({k: v.bfloat16() for k, v in t.items() if v.dim() == 2}))
    tensors = read_tensors(model)
    assert import_huggingface(model, tmp_path / "checkpoint").dtype == "mixed"
    export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), tensors)


@pytest.mark.parametrize("once", [False, True])
def test_a_reader_keeps_few_files_open(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 8 << 10)
    monkeypatch.setattr(reader_module, "MOST_OPEN", 3)
    checkpoint = tmp_path / "checkpoint"
    import_huggingface(model, checkpoint)
    assert len(list(checkpoint.glob("*.distcp"))) > 6

    def opened() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and checkpoint in link.resolve().parents for link in links)

    with CheckpointReader(checkpoint, once=once) as reader:
        whole = {name: reader.read(name) for name in reader.tensors}
        assert opened() == 3
        assert all(torch.equal(reader.read(name), whole[name]) for name in reversed(list(whole)))
        assert opened() == 3
    assert opened() == 0


def test_a_training_checkpoint_is_exported_from_its_shards(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    hf_files, architecture = tmp_path / "checkpoint" / "hf", open_manifest(tmp_path / "checkpoint").architecture
    config = {"data": {"train": [{"prefix": "/secret/place/xp3_sw"}, {"prefix": "p", "name": "flores"}]}}

    def chunks() -> Iterator[Chunk]:
        with CheckpointReader(tmp_path / "checkpoint") as reader:
            for name in reader.tensors:
                whole = reader.read(name)
                dim = 1 if "linear_proj.weight" in name or "linear_fc2.weight" in name else 0
                for rank, part in enumerate(whole.chunk(2, dim=dim)):  # as two tensor-parallel ranks hold them
                    offsets = [0] * whole.dim()
                    offsets[dim] = rank * part.size(dim)
                    yield name, part, offsets, whole.shape
                yield f"optimizer.state.exp_avg.{name}", whole, [0] * whole.dim(), whole.shape
        yield "rng.torch", torch.zeros(1, 1, 16), (0, 0, 0), (1, 1, 16)

    write_training_checkpoint(
        tmp_path / "run" / "checkpoints" / "step_0000007",
        chunks(),
        hf=hf_files,
        step=7,
        architecture=architecture,
        dtype="float32",
        config=config,
        consumed_rows=56,
        contents=["model", "optimizer", "rng"],
    )
    done = export_huggingface(tmp_path / "run", tmp_path / "exported")
    assert (done.step, done.tensors) == (7, 29)
    assert same_bits(read_tensors(tmp_path / "exported"), read_tensors(model))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "7 steps on 56 packed rows of xp3_sw, flores" in card and "secret" not in card


def test_outputs_are_never_overwritten(model: Path, tmp_path: Path) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="exists already"):
        import_huggingface(model, tmp_path / "checkpoint")
    (tmp_path / "exported").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert list((tmp_path / "exported").iterdir()) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/config.json", ".metadata"])
def test_a_damaged_checkpoint_is_not_exported(model: Path, tmp_path: Path, name: str) -> None:
    import_huggingface(model, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="bytes instead of"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "exported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model"]


@pytest.mark.parametrize("export", [export_huggingface, export_deepspeed])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", "hf/config.json", ".metadata", "common.pt"])
def test_an_altered_checkpoint_is_not_exported(
    model: Path, tmp_path: Path, name: str, export: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit leaves size and weights plausible: the hash alone tells."""
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 60_000)
    import_huggingface(model, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=f"checkpoint is not whole: {re.escape(name)} was altered"):
        export(tmp_path / "checkpoint", tmp_path / "exported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model"]
    if name.endswith(".distcp"):  # the control
        export(tmp_path / "checkpoint", tmp_path / "exported", verify=False)


def test_the_file_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(2, 3, 4).half(),
    }
    headers = [TensorHeader(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    file = SafetensorsFile("x.safetensors", headers)
    file.create(tmp_path)
    with open(tmp_path / "x.safetensors", "r+b") as stream:
        for name, tensor in tensors.items():
            if name == "scalar":
                file.write_rows(stream.fileno(), name, tensor, first=0)
                continue
            for first in reversed(range(0, len(tensor), 2)):
                file.write_rows(stream.fileno(), name, tensor[first : first + 2], first=first)
    assert same_bits(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)
    with open(tmp_path / "x.safetensors", "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        assert length % 8 == 0 and json.loads(stream.read(length))["__metadata__"] == {"format": "pt"}
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_are_filled_in_order() -> None:
    headers = [TensorHeader(name, (size,), torch.float32) for name, size in zip("abcd", (2, 3, 9, 1), strict=True)]
    planned = plan_shards(headers, shard_bytes=20)
    assert {name: [header.name for header in shard] for name, shard in planned.items()} == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
