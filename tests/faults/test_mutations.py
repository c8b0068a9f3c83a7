"""Files from outside, damaged at random: refused as a mistake or read within bounds; no crash, hang, or code run.

Each reader opens a damaged copy as the verbs do. An `XmtfError` is a refusal; what opens is read to its end, and must
hold what its own numbers say. Any other error, ten seconds, or a dead process fails the test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.config import RunConfig, load_config
from megatron_xmtf.conversion.huggingface import match_model
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.packing import build_packing_index, index_path
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import XmtfError
from megatron_xmtf.files import sha256_file
from megatron_xmtf.prompts.templates.template_files import load_templates
from tests.faults.mutations import edits, mutate
from tests.tiny import tiny_bloom, write_records, write_tiny_tokenizer

FAST, ALL = 25, 1000
TIME_LIMIT = 10
"""Seconds for one file of some kilobytes: every reader takes milliseconds."""
EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError in a reader that hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a reader took more than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_dataset(prefix: Path) -> None:
    """Read all examples; their lengths are those of the index."""
    for deep in (False, True):
        dataset = ExampleDataset.open(prefix, deep=deep)
        for index, (inputs, targets) in enumerate(dataset[number] for number in range(len(dataset))):
            assert (len(inputs), len(targets)) == (dataset.input_lengths[index], dataset.target_lengths[index])
        for name in dataset.column_names:
            values = dataset.column(name)
            assert values is not None and len(values) == len(dataset)
            assert not len(values) or int(values.max()) < len(dataset.names(name))


def read_packing_index(directory: Path) -> None:
    """Read all segments; each is of a dataset and an example that the index says it needs."""
    for verify in (False, True):
        index = PackingIndex.load(directory, verify=verify)
        assert len(index) == index.statistics["rows"] and index.capacity > 0
    assert len(index.example_ids[int(index.row_offsets[0]) : int(index.row_offsets[-1])]) == len(index.dataset_ids)


def read_checkpoint(directory: Path) -> None:
    """Read every tensor of a checkpoint whose manifest fits it."""
    verify_hashes(directory, open_manifest(directory))
    with CheckpointReader(directory) as reader:
        for name, tensor in reader.tensors.items():
            assert tuple(reader.read(name).shape) == tuple(tensor.shape)


def read_huggingface(directory: Path) -> None:
    """Match and read every tensor."""
    with HuggingFaceModel(directory) as model:
        match_model(model)
        for name, tensor in model.tensors.items():
            assert tuple(model.read(name).shape) == tensor.shape


def read_records(directory: Path) -> None:
    """Preprocess, and find every line of the file among the counts."""
    prefix = directory / "out" / "d"
    shutil.rmtree(prefix.parent, ignore_errors=True)
    tokenizer = directory / "tokenizer"
    found = preprocess(
        [directory / "records.jsonl"],
        tokenizer=tokenizer,
        output_prefix=prefix,
        on_bad_record="skip",
        show_progress=False,
    )["counts"]
    text = (directory / "records.jsonl").read_bytes()
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    parts = ("kept", "empty_inputs", "empty_targets", "malformed")
    assert found["read"] == sum(found[name] for name in parts) and found["read"] + found["blank_lines"] == lines


def reseal(directory: Path, name: str) -> None:
    """Bring a checkpoint's manifest up to a damaged file, so that the file itself is what is read."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    file = directory / name
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="module")
def originals(tiny_hf: Path, tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind of file, whole."""
    root = tmp_path_factory.mktemp("originals")
    (root / "dataset").mkdir()
    for path in tiny_pairs.parent.glob("tiny[_.]*"):
        shutil.copy(path, root / "dataset")
    shutil.copytree(tiny_checkpoint, root / "checkpoint")
    shutil.copytree(tiny_hf, root / "hf")
    shutil.copytree(tiny_hf, root / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_hf / "model.safetensors"), root / "pickled" / "pytorch_model.bin")
    tiny_bloom(layers=2).save_pretrained(root / "sharded", max_shard_size="200KB")
    assert (root / "sharded" / "model.safetensors.index.json").is_file()
    write_tiny_tokenizer(root / "records" / "tokenizer")
    write_records(root / "records" / "records.jsonl", 12)
    shutil.copytree(root / "records" / "tokenizer", root / "tokenizer")
    shutil.copytree(EXAMPLES / "templates", root / "templates")
    (root / "config").mkdir()
    shutil.copy(EXAMPLES / "own_data" / "train.yaml", root / "config" / "train.yaml")
    values = {"model": "m", "output": "o", "data": {"train": [{"prefix": "p"}]}, "schedule": {"train_steps": 2}}
    (root / "run.yaml").write_text(yaml.safe_dump({**values, "batch": {"sequence_length": 64}}), encoding="utf-8")
    config: RunConfig = load_config(root / "run.yaml")
    index = build_packing_index(
        [ExampleDataset.open(tiny_pairs)],
        data=config.data,
        sequence_length=64,
        rows_needed=8,
        seed=1,
        directory=root / "packing",
        guards=None,
    )
    index_path(root / "packing", index.key).rename(root / "index")
    return root


def template_of(originals: Path) -> str:
    return sorted(path.name for path in (originals / "templates").rglob("*.yaml"))[0]


SUBJECTS: dict[str, tuple[str, str, Callable[[Path], Any], bool]] = {
    # directory, file, reader of the directory, whether the manifest is brought up to the damage
    "index of an indexed dataset": ("dataset", "tiny_inputs_document.idx", lambda d: read_dataset(d / "tiny"), False),
    "the same without a manifest": ("dataset", "tiny_targets_document.idx", lambda d: read_dataset(d / "tiny"), True),
    "columns of a dataset": ("dataset", "tiny_columns.npz", lambda d: read_dataset(d / "tiny"), False),
    "manifest of a dataset": ("dataset", "tiny.json", lambda d: read_dataset(d / "tiny"), False),
    "manifest of a checkpoint": ("checkpoint", "manifest.json", read_checkpoint, False),
    "metadata of a checkpoint": ("checkpoint", ".metadata", read_checkpoint, True),
    "shard of a checkpoint": ("checkpoint", "__0_0.distcp", read_checkpoint, True),
    "manifest of a packing index": ("index", "packing.json", read_packing_index, False),
    "array of a packing index": ("index", "row_offsets.npy", read_packing_index, False),
    "records": ("records", "records.jsonl", read_records, False),
    "templates": ("templates", "", lambda d: [load_templates(path) for path in d.rglob("*.yaml")], False),
    "configuration": ("config", "train.yaml", lambda d: load_config(d / "train.yaml"), False),
    "safetensors": ("hf", "model.safetensors", read_huggingface, False),
    "pytorch_model.bin": ("pickled", "pytorch_model.bin", read_huggingface, False),
    "index of safetensors": ("sharded", "model.safetensors.index.json", read_huggingface, False),
    "config.json": ("hf", "config.json", read_huggingface, False),
    "tokenizer.json": ("tokenizer", "tokenizer.json", Tokenizer.load, False),
    "tokenizer_config.json": ("tokenizer", "tokenizer_config.json", Tokenizer.load, False),
}


def drill(name: str, originals: Path, tmp_path: Path, *, count: int) -> dict[str, Any]:
    """Read `count` damaged copies of a file; return how many were refused by which error, and how many were read."""
    folder, file, read, sealed = SUBJECTS[name]
    directory = tmp_path / folder
    shutil.copytree(originals / folder, directory)
    path = directory / (file or template_of(originals))
    if name == "templates":
        for other in directory.rglob("*.yaml"):
            if other.name != path.name:
                other.unlink()
        (path,) = directory.rglob("*.yaml")
    if name == "the same without a manifest":
        (directory / "tiny.json").unlink()
    whole = path.read_bytes()
    manifest = directory / "manifest.json"
    sealed_manifest = manifest.read_bytes() if sealed and manifest.exists() else None
    read(directory)
    outcomes: Counter[str] = Counter()
    listing = {one for one in originals.parent.rglob("*") if one.is_relative_to(originals)}

    # Derived from the test's name alone: the same damage every time.
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(edits)
    def check(wanted: list[tuple[str, float, int, bytes]]) -> None:
        damaged = mutate(whole, wanted)
        # A new file each time: one that is mapped somewhere must not shrink.
        path.unlink()
        path.write_bytes(damaged)
        if sealed_manifest is not None:
            manifest.write_bytes(sealed_manifest)
            reseal(directory, file)
        try:
            with time_limit():
                read(directory)
            outcomes["read"] += 1
        except XmtfError as error:
            outcomes[type(error).__name__] += 1

    check()
    assert {one for one in originals.parent.rglob("*") if one.is_relative_to(originals)} == listing
    assert not (tmp_path / "etc").exists() and sorted(os.listdir(tmp_path)) == [folder]
    return {"what": f"{name}, damaged at random", "trials": sum(outcomes.values()), "outcomes": dict(outcomes)}


@pytest.mark.parametrize("name", SUBJECTS)
def test_some_damaged_files(
    name: str, originals: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    result = drill(name, originals, tmp_path, count=FAST)
    record_property("drill", {**result, "problems": []})


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_thousand_damaged_files(
    name: str, originals: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    result = drill(name, originals, tmp_path, count=ALL)
    record_property("drill", {**result, "problems": []})
    assert result["trials"] >= ALL or name == "records"
    assert set(result["outcomes"]) - {"read"}, "some damage is refused"
