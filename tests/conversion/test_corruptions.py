"""100 damaged Hugging Face models: each refused with the file and the tensor named, and nothing is left at the output.

Each case is a fresh copy of a small sharded model, one kind of damage at a place drawn from the case's number, and
`xmtf import`. What no file can tell (a flipped bit that leaves a weight finite, in a format without checksums) is not
among them: `xmtf verify` against the origin tells that.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xmtf import errors
from megatron_xmtf.cli import main
from megatron_xmtf.errors import XmtfError
from tests.tiny import tiny_bloom, tiny_mt5, write_tiny_tokenizer

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path, random.Random], tuple[str, ...]]
"""Damages a directory; returns what the message must hold: the file's name, and the tensor's where one is concerned."""
INDEX = "model.safetensors.index.json"
OTHER_TYPES = (torch.int32, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn)


def write_sharded(directory: Path, model: Any) -> None:
    """Write a model as `save_pretrained` does, in four shards or more, with a tokenizer."""
    model.save_pretrained(directory, max_shard_size="40KB")
    write_tiny_tokenizer(directory)
    assert len(shards(directory)) >= 4


def write_pickled(source: Path, directory: Path) -> None:
    """Write the same as .bin shards."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = json.loads((source / INDEX).read_text())
    for path in shards(source):
        torch.save(load_file(path), directory / f"{path.stem}.bin")
    index["weight_map"] = {name: f"{Path(file).stem}.bin" for name, file in index["weight_map"].items()}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families, as safetensors and pickled."""
    root = tmp_path_factory.mktemp("originals")
    write_sharded(root / "bloom", tiny_bloom(hidden_size=32, layers=2))
    write_sharded(root / "mt5", tiny_mt5(encoder_layers=1, decoder_layers=1))
    for family in ("bloom", "mt5"):
        write_pickled(root / family, root / f"{family} pickled")
    return root


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors")) or sorted(directory.glob("model-*.bin"))


@contextmanager
def edited_tensors(path: Path) -> Iterator[Tensors]:
    """Change the tensors of a shard with the library."""
    tensors = load_file(path)
    yield tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


@contextmanager
def edited_json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextmanager
def edited_header(path: Path) -> Iterator[dict[str, Any]]:
    """Change a shard's header by hand; the numbers stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    yield header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def draw_tensor(directory: Path, draw: random.Random) -> tuple[Path, str]:
    """Draw a shard and a tensor in it that is no table of words, copies of which are compared first."""
    places = [(path, name) for path in shards(directory) for name in sorted(load_file(path))]
    return draw.choice([(p, n) for p, n in places if "embeddings.weight" not in n and n != "lm_head.weight"])


def relist(directory: Path, *, add: dict[str, str] | None = None, remove: str | None = None) -> None:
    """Bring the index up to a damaged shard."""
    with edited_json(directory / INDEX) as index:
        index["weight_map"].pop(remove, None)
        index["weight_map"].update(add or {})


def cut(path: Path, draw: random.Random) -> None:
    """Cut a file off at least two bytes before its end: what a JSON file lacks then is not a newline alone."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size - 2)])


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def cut_shard(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    keep = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:keep])
    del header["__metadata__"]
    ends = sorted((8 + length + entry["data_offsets"][1], name) for name, entry in header.items())
    # Where the header is whole, the first tensor that is not.
    return (path.name,) if keep < 8 + length else (path.name, next(name for end, name in ends if end > keep))


def flip_header(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    free = data.index(b'"format":"pt"')  # whoever wrote it may say more here, and no reader minds
    places = [place for place in range(8 + length) if not free <= place < free + len(b'"format":"pt"')]
    flip(path, draw.choice(places), draw.randrange(8))
    return (path.name,)


def garble_shard(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    path.write_bytes(draw.randbytes(draw.choice([1, 8, 100, 10_000])))
    return (path.name,)


def remove_shard(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    path.unlink()
    if draw.random() < 0.5:
        path.symlink_to("nowhere")
    return (path.name,)


def swap_shards(directory: Path, draw: random.Random) -> tuple[str, ...]:
    one, other = draw.sample(shards(directory), 2)
    one.rename(directory / "aside")
    other.rename(one)
    (directory / "aside").rename(other)
    return (INDEX, min(one, other).name)


def remove_tensor(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    with edited_tensors(path) as tensors:
        del tensors[name]
    listed = draw.random() < 0.5
    if not listed:
        relist(directory, remove=name)
    return (INDEX, name, *([path.name] if listed else []))


def add_tensor(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    added = draw.choice([f"{name}_scale", "score.weight", "transformer.h.9.ln_f.bias"])
    with edited_tensors(path) as tensors:
        tensors[added] = torch.ones(3)
    relist(directory, add={added: path.name})
    return (INDEX, added)


def double_tensor(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    other = draw.choice([shard for shard in shards(directory) if shard != path])
    with edited_tensors(other) as tensors:
        tensors[name] = load_file(path)[name]
    if draw.random() < 0.5:
        relist(directory, add={name: other.name})
        return (INDEX, path.name, name)
    return (INDEX, other.name, name)


def reshape_tensor(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    with edited_tensors(path) as tensors:
        whole = tensors[name]
        tensors[name] = draw.choice([whole[:-1], torch.cat([whole, whole[:1]]), whole[..., None], whole.flatten()[:7]])
    return (path.name, name)


def retype_tensor(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    with edited_tensors(path) as tensors:
        tensors[name] = tensors[name].to(draw.choice(OTHER_TYPES))
    return (path.name, name)


def burst_number(directory: Path, draw: random.Random) -> tuple[str, ...]:
    """Set the exponent's bits of one number: NaN, or infinite."""
    path, name = draw_tensor(directory, draw)
    with edited_tensors(path) as tensors:
        flat = tensors[name].view(-1).view(torch.int32)
        flat[draw.randrange(len(flat))] |= 0x7F800000
    return (path.name, name)


def overlap(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    with edited_header(path) as header:
        begin, end = header[name]["data_offsets"]
        step = draw.choice([-4, 4, 400, -(10**6), 2**40])
        header[name]["data_offsets"] = [begin + step, end + step]
    return (path.name, name) if step < 0 else (path.name,)


def lengthen(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    with edited_header(path) as header:
        if draw.random() < 0.5:
            header[name]["data_offsets"][1] += draw.choice([4, 4096, 2**62])
        else:
            header[name]["shape"][0] *= draw.choice([2, 2**31, 2**63])
    return (path.name, name)


def double_entry(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.dumps(json.loads(data[8 : 8 + length])[name])
    text = data[8 : 8 + length].rstrip()[:-1] + f',"{name}":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return (path.name, name)


def declare_header(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    length = draw.choice([0, 1, 7, path.stat().st_size - 8, path.stat().st_size, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    return (path.name,)


def another_framework(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    with edited_header(path) as header:
        header["__metadata__"]["format"] = draw.choice(["flax", "tf", "np"])
    return (path.name,)


def escape(directory: Path, draw: random.Random) -> tuple[str, ...]:
    """Let the index lead to a whole shard outside of the directory."""
    path = draw.choice(shards(directory))
    outside = directory.parent / "outside.safetensors"
    path.rename(outside)
    name = draw.choice(["../outside.safetensors", str(outside), "a/../../outside.safetensors", "link.safetensors"])
    (directory / "link.safetensors").symlink_to(outside)
    with edited_json(directory / INDEX) as index:
        for tensor, file in index["weight_map"].items():
            if file == path.name:
                index["weight_map"][tensor] = name
    return (name,)


def misplace(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    other = draw.choice([shard for shard in shards(directory) if shard != path])
    relist(directory, add={name: other.name})
    return (INDEX, name)


def list_too_much(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path, name = draw_tensor(directory, draw)
    relist(directory, add={f"{name}2": path.name})
    return (INDEX, path.name, f"{name}2")


def garble_index(directory: Path, draw: random.Random) -> tuple[str, ...]:
    _, name = draw_tensor(directory, draw)
    with edited_json(directory / INDEX) as index:
        value = draw.choice([None, 3, [], {}, "x", {name: 3}, {name: None}, {name: ""}, {name: "a\0b"}, {name: "."}])
        if value is None:
            del index["weight_map"]
        else:
            index["weight_map"] = value
    return (str(directory) if isinstance(value, dict) and value else INDEX,)


def garble_sizes(directory: Path, draw: random.Random) -> tuple[str, ...]:
    with edited_json(directory / "config.json") as config:
        names = ["hidden_size", "n_layer", "vocab_size"] if config["model_type"] == "bloom" else []
        name = draw.choice(names or ["d_model", "num_layers", "num_decoder_layers", "num_heads", "d_kv", "vocab_size"])
        value = config[name]
        config[name] = draw.choice([value + 1, value * 2, 2**31, 10**30, 0, -value, f"{value}", [value], None, 1e308])
        if config[name] is None and name == "num_decoder_layers":
            config["num_layers"] = config[name] = 5
    return ("config.json",)


def garble_value(directory: Path, draw: random.Random) -> tuple[str, ...]:
    changes: list[dict[str, Any]] = [
        *({"model_type": None}, {"model_type": "bloomz"}, {"model_type": ["bloom"]}),
        *({"auto_map": {"AutoModel": "x.Y"}}, {"quantization_config": {"bits": 8}}),
        *({"layer_norm_epsilon": "1e-5"}, {"layer_norm_epsilon": -1}),
    ]
    with edited_json(directory / "config.json") as config:
        config.update(draw.choice(changes))
    return ("config.json",)


def damage_text(name: str) -> Damage:
    """Cut a JSON file off, or set the highest bit of a byte: no UTF-8 any more."""

    def damage(directory: Path, draw: random.Random) -> tuple[str, ...]:
        path = directory / name
        if draw.random() < 0.5:
            cut(path, draw)
        else:
            flip(path, draw.randrange(path.stat().st_size), 7)
        return (name,)

    return damage


def cut_pickle(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return (path.name,)


def flip_pickled_number(directory: Path, draw: random.Random) -> tuple[str, ...]:
    """Flip a bit of a weight's mantissa: the archive's checksum is all that tells."""
    path = draw.choice(shards(directory))
    tensors = torch.load(path, weights_only=True)
    name = draw.choice(sorted(tensors))
    numbers = tensors[name].flatten()
    flip(path, path.read_bytes().index(numbers.numpy().tobytes()) + 4 * draw.randrange(len(numbers)), draw.randrange(8))
    return (path.name, name)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def hide_code(directory: Path, draw: random.Random) -> tuple[str, ...]:
    """Put code into a pickle, in an archive or as torch before 1.6 wrote them."""
    path = draw.choice(shards(directory))
    tensors = torch.load(path, weights_only=True)
    tensors[draw.choice(sorted(tensors))] = Payload(directory.parent / "canary")
    torch.save(tensors, path, _use_new_zipfile_serialization=draw.random() < 0.5)
    return (path.name, "mkdir")


def pickle_something_else(directory: Path, draw: random.Random) -> tuple[str, ...]:
    path = draw.choice(shards(directory))
    tensors = torch.load(path, weights_only=True)
    name = draw.choice(sorted(tensors))
    kind = draw.randrange(3)
    if kind == 0:
        torch.save({"model": tensors}, path)
        return (path.name,)
    tensors[name] = tensors[name].to(torch.int32) if kind == 1 else tensors[name].double()
    torch.save(tensors, path)
    return (path.name, name)


KINDS: dict[str, tuple[Damage, int]] = {
    # damage, how many draws of each family
    "a shard cut off": (cut_shard, 4),
    "a bit flipped in a header": (flip_header, 5),
    "garbage in place of a shard": (garble_shard, 1),
    "a shard missing": (remove_shard, 2),
    "two shards swapped": (swap_shards, 1),
    "a tensor missing": (remove_tensor, 2),
    "an unknown tensor": (add_tensor, 2),
    "a tensor in two shards": (double_tensor, 2),
    "a wrong shape": (reshape_tensor, 1),
    "a type that is no weight's": (retype_tensor, 2),
    "a number whose exponent burst": (burst_number, 2),
    "offsets that overlap or leave a hole": (overlap, 2),
    "an entry longer than its tensor": (lengthen, 2),
    "a tensor twice in a header": (double_entry, 1),
    "a header of another length": (declare_header, 2),
    "a shard for another framework": (another_framework, 1),
    "an index that leads outside": (escape, 3),
    "a tensor listed in another shard": (misplace, 1),
    "a tensor listed that is nowhere": (list_too_much, 1),
    "an index of something else": (garble_index, 2),
    "an index that is no JSON": (damage_text(INDEX), 2),
    "a config.json that is no JSON": (damage_text("config.json"), 1),
    "a config.json of other sizes": (garble_sizes, 2),
    "a config.json of something else": (garble_value, 1),
    "a tokenizer.json that is no JSON": (damage_text("tokenizer.json"), 1),
    "a .bin cut off": (cut_pickle, 1),
    "a bit flipped in a .bin": (flip_pickled_number, 1),
    "a .bin with code": (hide_code, 1),
    "a .bin of something else": (pickle_something_else, 1),
}
CASES = [
    (family, kind, number)
    for kind, (_, draws) in KINDS.items()
    for family in ("bloom", "mt5")
    for number in range(draws)
]


def test_these_are_a_hundred() -> None:
    assert len(CASES) == 100


@pytest.mark.parametrize("name", ["bloom", "mt5", "bloom pickled", "mt5 pickled"])
def test_the_untouched_model_is_imported(originals: Path, tmp_path: Path, name: str) -> None:
    assert main(["import", "--hf", str(originals / name), "--output", str(tmp_path / "checkpoint")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("family", "kind", "number"), CASES)
def test_it_is_refused_by_name_and_leaves_nothing(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, kind: str, number: int
) -> None:
    directory, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(originals / (f"{family} pickled" if ".bin" in kind else family), directory)
    output.mkdir()
    wanted = KINDS[kind][0](directory, random.Random(f"{family} {kind} {number}"))
    before = sorted(path.name for path in tmp_path.iterdir())
    code = main(["import", "--hf", str(directory), "--output", str(output / "checkpoint")])
    said = capsys.readouterr().err
    refusal = re.match(r"xmtf import: (\w+): ", said)
    assert refusal is not None and said.count("\n") == 1, said
    error = getattr(errors, refusal[1])
    assert issubclass(error, XmtfError) and code == error.exit_code
    assert not [word for word in wanted if word not in said], said
    assert list(output.iterdir()) == [] and sorted(path.name for path in tmp_path.iterdir()) == before
