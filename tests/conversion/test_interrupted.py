"""A conversion that is killed goes on where it was, with several processes, to the same bits as an undisturbed one."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.conversion import average as average_module
from megatron_xmtf.conversion import checkpoint_parts, export_parts, tensor_source
from megatron_xmtf.conversion.average import average_checkpoints
from megatron_xmtf.conversion.deepspeed import import_deepspeed
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.megatron_core import import_megatron
from megatron_xmtf.data.journal import Journal
from megatron_xmtf.errors import DatasetError
from tests.conversion import deepspeed_files as files
from tests.conversion.test_huggingface import Tensors, read_tensors, same_bits, write_model

Convert = Callable[..., Any]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(export_parts, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(average_module, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(checkpoint_parts, "FILE_BYTES", 15_000)
    monkeypatch.setattr(export_parts, "TASK_BYTES", 15_000)


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Tensors]:
    return tmp_path / "model", write_model(tmp_path / "model", dtype=torch.float32, shard="40KB")


def kill(convert: Convert, output: Path, *, after: int) -> Path:
    """Run a conversion in a process that dies with its `after`-th entry in the journal; return what it leaves."""

    def run() -> None:
        torch.set_num_threads(1)  # the threads of this process did not come along
        write, entries = Journal.write, itertools.count(1)

        def write_and_die(self: Journal, directory: Path) -> None:
            write(self, directory)
            if next(entries) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.write = write_and_die  # type: ignore[method-assign]
        convert(output)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    [left] = output.parent.glob(f"{output.name}.tmp-*")
    return left


def weights_of(checkpoint: Path) -> Tensors:
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def hugging_face(model: Path, place: Path) -> tuple[Convert, int]:
    return partial(import_huggingface, model), 2


def deepspeed(model: Path, place: Path) -> tuple[Convert, int]:
    """Layer files of two ranks, with copies that drifted apart at both ends of the model."""
    tensors = files.hf_tensors(layers=4)
    files.write_layers(place, tensors, tp=2)
    files.write_settings(place, tensors, tp=2, pp=1)
    for name, key in (("layer_01", "word_embeddings.norm.bias"), ("layer_08", "weight")):
        path = place / f"{name}-model_01-model_states.pt"
        state = torch.load(path, weights_only=True)
        state[key] += 0.5
        torch.save(state, path)
    return partial(import_deepspeed, place), 2


def megatron_core(model: Path, place: Path) -> tuple[Convert, int]:
    import_huggingface(model, place)
    return partial(import_megatron, place, config=model), 1


def average(model: Path, place: Path) -> tuple[Convert, int]:
    for name, dtype in (("a", None), ("b", torch.bfloat16)):
        import_huggingface(model, place / name, dtype=dtype)
    return partial(average_checkpoints, [place / "a", place / "b"], dtype=torch.float32), 1


@pytest.mark.parametrize("source", [hugging_face, deepspeed, megatron_core, average])
def test_a_checkpoint_is_gone_on_with(
    model: tuple[Path, Tensors],
    tmp_path: Path,
    small_parts: None,
    source: Callable[[Path, Path], tuple[Convert, int]],
) -> None:
    convert, workers = source(model[0], tmp_path / "source")
    whole = convert(tmp_path / "whole")
    left = kill(convert, tmp_path / "again", after=3)
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(left.glob("*.distcp"))[:3]}
    assert kept
    again = convert(tmp_path / "again", workers=workers)
    assert same_bits(weights_of(tmp_path / "again"), weights_of(tmp_path / "whole"))
    for name, changed in kept.items():
        assert (tmp_path / "again" / name).stat().st_mtime_ns == changed, "what was done is not done again"
    assert not list(tmp_path.glob("*.tmp-*"))
    # What is reported is of both runs and of all processes: one of the drifted weights was read before the kill.
    assert replace(again, checkpoint=whole.checkpoint) == whole
    assert getattr(whole, "differing_replicas", 2) == 2


def test_an_export_goes_on(model: tuple[Path, Tensors], tmp_path: Path, small_parts: None) -> None:
    import_huggingface(model[0], tmp_path / "checkpoint")
    left = kill(partial(export_huggingface, tmp_path / "checkpoint"), tmp_path / "hf", after=2)
    # The control: what the journal says is written is not written again, so an altered number stays.
    altered = tmp_path / "altered.tmp-1"
    shutil.copytree(left, altered)
    stored = bytearray((altered / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", stored[:8])
    place = json.loads(stored[8 : 8 + length])["transformer.word_embeddings.weight"]["data_offsets"][0]
    stored[8 + length + place] ^= 1
    (altered / "model.safetensors").write_bytes(stored)
    export_huggingface(tmp_path / "checkpoint", tmp_path / "altered")
    assert not same_bits(read_tensors(tmp_path / "altered"), model[1])
    export_huggingface(tmp_path / "checkpoint", tmp_path / "hf")
    assert same_bits(read_tensors(tmp_path / "hf"), model[1])
    assert not list(tmp_path.glob("*.tmp-*"))


def test_another_conversion_does_not_go_on_from_it(
    model: tuple[Path, Tensors], tmp_path: Path, small_parts: None
) -> None:
    kill(partial(import_huggingface, model[0]), tmp_path / "again", after=2)
    with pytest.raises(DatasetError, match=r"dtype was 'None', is 'torch.bfloat16'.*--restart"):
        import_huggingface(model[0], tmp_path / "again", dtype=torch.bfloat16)
    import_huggingface(model[0], tmp_path / "again", dtype=torch.bfloat16, restart=True)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights_of(tmp_path / "again").values())
