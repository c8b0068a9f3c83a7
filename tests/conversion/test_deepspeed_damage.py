"""Megatron-DeepSpeed checkpoints damaged at random: refused by name with nothing left, or read as they were."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.conversion.deepspeed import WeightSource, import_deepspeed
from megatron_xmtf.errors import XmtfError
from tests.conversion import deepspeed_files as files

Damage = Callable[[Path, random.Random], str | None]
"""Damages a directory; returns what a message must name, None where a reader may not notice what changes nothing."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step = tmp_path_factory.mktemp("whole") / "step"
    tensors = files.hf_tensors(layers=2)
    files.write_layers(step, tensors, tp=2)
    files.write_settings(step, tensors, tp=2, pp=1)
    files.write_optimizer(step, tensors, tp=2, pp=1, dp=3)
    return step


def pick(step: Path, draw: random.Random, pattern: str = "*") -> Path:
    # Of the settings files only the first is read, they are all the same.
    return draw.choice(sorted(p for p in step.glob(pattern) if p.name != "mp_rank_01_model_states.pt"))


def flip(step: Path, draw: random.Random) -> None:
    path = pick(step, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(step: Path, draw: random.Random) -> str:
    path = pick(step, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return path.name


def remove(step: Path, draw: random.Random) -> str:
    path = pick(step, draw, "*zero*" if draw.random() < 0.5 else "layer*")
    path.unlink()
    return path.name.removeprefix("bf16_zero")


def double(step: Path, draw: random.Random) -> str:
    path = pick(step, draw, "layer*")
    shutil.copy(path, step / path.name.replace("layer_0", "layer_"))
    return path.name


def alter(step: Path, draw: random.Random) -> str:
    """Change one tensor of a layer file: gone, new, other shape, other type, not finite."""
    path = pick(step, draw, "layer*")
    state = torch.load(path, weights_only=True)
    name = draw.choice(sorted(state))
    kind = draw.randrange(5)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state["lm_head.weight"], name = state[name].clone(), "lm_head.weight"
    elif kind == 2:
        state[name] = torch.cat([state[name], state[name][:1]])
    elif kind == 3:
        state[name] = state[name].to(draw.choice([torch.int8, torch.float64, torch.float32]))
    else:
        state[name].view(-1)[draw.randrange(state[name].numel())] = draw.choice([torch.nan, torch.inf])
    torch.save(state, path)
    return name


DAMAGES: tuple[Damage, ...] = (flip, flip, truncate, remove, double, alter, alter)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def drill(whole: Path, work: Path, count: int, seed: int) -> tuple[int, int]:
    """Damage a copy `count` times; return refusals, and reads of what was not changed."""
    draw, refused, unchanged = random.Random(seed), 0, 0
    expected = {}
    for weights in ("stored", "fp32"):
        import_deepspeed(whole, work / weights, weights=weights)  # type: ignore[arg-type]
        expected[weights] = tensors_of(work / weights)
    for number in range(count):
        step, output = work / f"{number}" / "step", work / f"{number}" / "out" / "checkpoint"
        shutil.copytree(whole, step)
        named = draw.choice(DAMAGES)(step, draw)
        weights: WeightSource = draw.choice(["stored", "fp32"])
        try:
            import_deepspeed(step, output, weights=weights)
        except XmtfError as error:
            refused += 1
            assert named is None or named in str(error), f"{named}: {error}"
            assert not output.parent.exists() or not list(output.parent.iterdir())
        else:
            unchanged += 1
            found = tensors_of(output)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected[weights].items()), number
        shutil.rmtree(work / f"{number}")
    return refused, unchanged


def test_some_damages(whole: Path, tmp_path: Path) -> None:
    refused, unchanged = drill(whole, tmp_path, count=40, seed=1)
    assert refused > 20 and refused + unchanged == 40


@pytest.mark.slow
def test_many_damages(whole: Path, tmp_path: Path) -> None:
    refused, unchanged = drill(whole, tmp_path, count=600, seed=2)
    assert refused > 300 and refused + unchanged == 600
