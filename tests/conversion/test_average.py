"""Averages of checkpoints are what torch computes by hand; what has no average is refused without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.cli import main
from megatron_xmtf.conversion import average
from megatron_xmtf.conversion.average import average_checkpoints
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, NonFiniteError
from megatron_xmtf.files import sha256_file, write_json
from megatron_xmtf.models.architecture import BloomArchitecture
from tests.torch_dist_files import write_training_checkpoint

Tensors = dict[str, torch.Tensor]
ARCHITECTURE = BloomArchitecture(hidden_size=16, num_layers=1, num_attention_heads=2, vocab_size=40)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (37, 5), "b.bias": (11,), "c": (3, 2, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(
    path: Path, tensors: Tensors, *, step: int = 5, chunk_rows: int = 7, prefix_lm: bool = False, **fields: Any
) -> Path:
    """Write a checkpoint with optimizer and RNG state, in chunks of a few rows."""
    architecture = {**ARCHITECTURE.to_mapping(), **fields}
    every = {**tensors, "optimizer.state.exp_avg.a.weight": torch.ones(37, 5), "rng.torch": torch.zeros(1, 1, 1, 8)}
    settings: dict[str, Any] = {"step": step, "architecture": architecture, "dtype": "float32"}
    settings["config"] = {"batch": {"prefix_lm": True}} if prefix_lm else None
    chunks = (
        (name, tensor[start : start + chunk_rows], (start, *[0] * (tensor.dim() - 1)), tensor.shape)
        for name, tensor in every.items()
        for start in range(0, len(tensor), chunk_rows)
    )
    hf = path.with_name(f"{path.name} hf")
    write_json(hf / "config.json", {"model_type": "bloom"})
    contents = ["model", "optimizer", "rng"]
    return write_training_checkpoint(path, chunks, hf=hf, **settings, consumed_rows=0, contents=contents)


def read(path: Path) -> Tensors:
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def refuse(tmp_path: Path, paths: list[Path], error: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        average_checkpoints(paths, tmp_path / "out" / "average", **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weighted_averages_in_fp64(tmp_path: Path, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(average, "CHUNK_BYTES", 90)
    sources = [draw(seed, dtype) for seed in range(3)]
    paths = [write(tmp_path / str(n), tensors, chunk_rows=4 + n, step=n) for n, tensors in enumerate(sources)]
    weights = [0.3, 0.9, -0.2]
    done = average_checkpoints(paths, tmp_path / "average", weights=weights)
    found = read(tmp_path / "average")
    assert found.keys() == sources[0].keys() and (done.tensors, done.parameters) == (3, 37 * 5 + 11 + 24)
    for name, tensor in found.items():
        expected = sum(weight * source[name].double() for weight, source in zip(weights, sources, strict=True))
        assert isinstance(expected, torch.Tensor) and tensor.dtype == dtype
        # Products and sums in fp64 differ by rounding at most, which 24 bits or fewer do not show.
        assert torch.equal(tensor, expected.to(dtype))
    manifest = open_manifest(tmp_path / "average")
    verify_hashes(tmp_path / "average", manifest)
    assert (manifest.step, manifest.contents, manifest.config) == (0, ("model",), None)
    assert manifest.origin["average_of"] == [
        {"name": str(n), "step": n, "manifest_sha256": sha256_file(path / "manifest.json"), "weight": weights[n]}
        for n, path in enumerate(paths)
    ]
    assert (tmp_path / "average" / "hf" / "config.json").is_file()


def test_equal_weights_of_one_checkpoint_are_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = draw(0)
    paths = [write(tmp_path / name, tensors) for name in "abc"]
    words = [word for path in paths for word in ("--checkpoint", str(path))]
    assert main(["average", *words, "--output", str(tmp_path / "average"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weights"] == [1 / 3] * 3 and report["dtype"] == "float32"
    found = read(tmp_path / "average")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert main(["average", *words, "--output", str(tmp_path / "average")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_types_that_differ_need_one_to_be_named(tmp_path: Path) -> None:
    sources = [draw(0), draw(1, torch.bfloat16)]
    paths = [write(tmp_path / str(n), tensors) for n, tensors in enumerate(sources)]
    refuse(tmp_path, paths, CheckpointError, "a.weight is float32 in .*, bfloat16 in .*--dtype")
    average_checkpoints(paths, tmp_path / "average", dtype=torch.float16)
    expected = (sources[0]["c"].double() / 2 + sources[1]["c"].double() / 2).half()
    assert torch.equal(read(tmp_path / "average")["c"], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d": torch.ones(2)}, CheckpointError, "do not hold the same tensors: d "),
        ({"b.bias": torch.ones(12)}, CheckpointError, "do not hold the same tensors: b.bias "),
        ({"b.bias": torch.ones(11, dtype=torch.int64)}, CheckpointError, "b.bias hold whole numbers"),
        ({"b.bias": torch.full((11,), torch.inf)}, NonFiniteError, "b.bias in .*1 holds NaN or Inf"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Tensors, error: type[Exception], message: str) -> None:
    paths = [write(tmp_path / "0", draw(0)), write(tmp_path / "1", {**draw(1), **change})]
    refuse(tmp_path, paths, error, message)


def test_another_architecture(tmp_path: Path) -> None:
    paths = [write(tmp_path / "0", draw(0)), write(tmp_path / "1", draw(1), num_layers=2, hidden_dropout=0.1)]
    refuse(tmp_path, paths, CheckpointError, "1 and .*0 are not of one architecture: num_layers is 2, not 1.")


def test_prefix_lms_stay_prefix_lms(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n), draw(n), prefix_lm=n < 2) for n in range(3)]
    average_checkpoints(paths[:2], tmp_path / "average")
    assert attends_prefix(tmp_path / "average", open_manifest(tmp_path / "average"))
    average_checkpoints(paths[2:] * 2, tmp_path / "causal")
    assert not attends_prefix(tmp_path / "causal", open_manifest(tmp_path / "causal"))
    refuse(tmp_path, paths, CheckpointError, "some of the checkpoints were trained to read inputs in both directions")


def test_a_damaged_source(tmp_path: Path) -> None:
    paths = [write(tmp_path / "0", draw(0)), write(tmp_path / "1", draw(1))]
    (paths[1] / "__0_0.distcp").write_bytes(b"short")
    refuse(tmp_path, paths, CorruptCheckpointError, "__0_0.distcp has 5 bytes")


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, None, "1 checkpoint to average"),
        (2, [0.5], "2 checkpoints and 1 weights"),
        (2, [0.5, 0.6], "sum to 1.1"),
        (2, [float("nan"), 1.0], "sum to nan"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, count: int, weights: list[float] | None, message: str) -> None:
    paths = [write(tmp_path / str(n), draw(n)) for n in range(count)]
    refuse(tmp_path, paths, ConfigError, message, weights=weights)
