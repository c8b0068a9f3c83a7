"""2N steps = N steps + stop + N steps, bit for bit at the same layout: metrics, weights, optimizer, RNG, loss scale.

Each case trains an uninterrupted run that saves at N and 2N, copies the run as it was at N, and goes on from there.
Dropout is on, so that RNG states must be right; the learning rate moves, so that the schedule must be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigMismatchError, CorruptCheckpointError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.prepare import open_training_rows, prepare_run
from megatron_xmtf.training.trainer import train_rank
from tests.checkpoint.test_sharded import read_metrics, read_tensors, train_to
from tests.layouts import PP, TP

N = 2
SCHEDULE = {"train_steps": 2 * N, "lr_decay_style": "cosine", "lr_warmup_steps": 1}
COUNTED = ("loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "target_tokens", "loss_scale", "skipped")
ZERO: dict[str, Any] = {"use_distributed_optimizer": True}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # ranks, sections
    "TP2-PP1-fp32-ZeRO": (2, {"parallel": {TP: 2, **ZERO}}),
    "DP2-bf16-ZeRO-overlap": (
        2,
        {"precision": "bf16", "parallel": {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "DP2-bf16": (2, {"precision": "bf16"}),
    "PP2-fp16": (2, {"precision": "fp16", "parallel": {PP: 2}}),
    "DP2-fp16-ZeRO": (2, {"precision": "fp16", "parallel": ZERO}),
    "TP2-adafactor": (2, {"optimizer": {"name": "adafactor", "lr": 1e-3}, "parallel": {TP: 2}}),
    "TP2-SP-PP2-fp32-ZeRO": (4, {"parallel": {TP: 2, PP: 2, "sequence_parallel": True, **ZERO}}),
}


@pytest.fixture(scope="module")
def dropout_hf(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with dropout of hidden states and attention."""
    model = shutil.copytree(tiny_hf, tmp_path_factory.mktemp("dropout") / "hf")
    values = json.loads((model / "config.json").read_text())
    values.update(hidden_dropout=0.1, attention_dropout=0.1)
    (model / "config.json").write_text(json.dumps(values))
    return model


def whole_and_resumed(config: RunConfig, make: Callable[..., RunConfig], world_size: int, **sections: Any) -> Any:
    """Train 2N steps, then N more from a copy at N; return metrics and run directory of both."""
    metrics = train_to(config, world_size)
    output = Path(config.output).with_name("resumed")
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "checkpoints" / f"step_{2 * N:07d}")
    again = make(output=str(output), **sections)
    return metrics, Path(config.output), train_to(again, world_size), output


@pytest.mark.parametrize("name", CASES)
def test_stopping_changes_nothing(name: str, dropout_hf: Path, run_config: Callable[..., RunConfig]) -> None:
    world_size, extra = CASES[name]
    sections = {"model": str(dropout_hf), "schedule": SCHEDULE, "checkpoint": {"save_interval": N}, **extra}
    whole, whole_run, resumed, resumed_run = whole_and_resumed(
        run_config(**sections), run_config, world_size, **sections
    )
    for step in range(N + 1, 2 * N + 1):
        for key in COUNTED:
            assert resumed[step][key] == whole[step][key], f"{key} of step {step}"
    assert len({whole[step]["learning_rate"] for step in whole if step > N}) == N, "the schedule moves"
    ours, theirs = (read_tensors(run / "checkpoints" / f"step_{2 * N:07d}") for run in (resumed_run, whole_run))
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different
    at_n = read_tensors(whole_run / "checkpoints" / f"step_{N:07d}")
    moved = [key for key in ours if ours[key].is_floating_point() and not torch.equal(ours[key], at_n[key])]
    assert len(moved) > len(ours) / 2, "the last N steps changed the weights: the comparison can fail"


@pytest.mark.parametrize("parallel", [{}, ZERO], ids=["whole", "ZeRO"])
def test_a_loss_scale_that_has_moved_is_taken_up(
    parallel: dict[str, Any], dropout_hf: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 2^40 every step overflows, and the scale halves from the second on: no moment exists when N is saved."""
    monkeypatch.setattr("megatron_xmtf.training.optimizer.INITIAL_LOSS_SCALE", 2.0**40)
    sections: dict[str, Any] = {
        "model": str(dropout_hf),
        "schedule": SCHEDULE,
        "checkpoint": {"save_interval": N},
        "precision": "fp16",
        "parallel": parallel,
    }
    whole, _, resumed, _ = whole_and_resumed(run_config(**sections), run_config, 2, **sections)
    scales = [whole[step]["loss_scale"] for step in sorted(whole)]
    assert scales[0] == 2.0**40 and scales[-1] < scales[N] < scales[0]
    assert [resumed[step]["loss_scale"] for step in sorted(resumed)] == scales


def test_rng_states_matter(dropout_hf: Path, run_config: Callable[..., RunConfig], monkeypatch: Any) -> None:
    """The negative control: a resume that takes up all but the RNG states is seen."""
    sections: dict[str, Any] = {"model": str(dropout_hf), "schedule": SCHEDULE, "checkpoint": {"save_interval": N}}
    monkeypatch.setattr("megatron_xmtf.checkpoint.sharded.set_rng_states", lambda states: None)
    whole, _, resumed, _ = whole_and_resumed(run_config(**sections), run_config, 2, **sections)
    assert resumed[N + 1]["loss"] != whole[N + 1]["loss"]
    assert resumed[N + 1]["tokens"] == whole[N + 1]["tokens"]


def layouts_with_and_without_a_gpu() -> tuple[dict[str, int], dict[str, int]]:
    """Return what a rank's layout is here, and where torch says that there is a GPU."""
    from megatron_xmtf.checkpoint.state import current_layout
    from megatron_xmtf.config import ParallelConfig
    from megatron_xmtf.parallel.topology import initialize_parallel

    initialize_parallel(ParallelConfig(), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = current_layout()
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return on_cpu, current_layout()


@pytest.mark.slow
def test_a_checkpoint_of_a_gpu_is_taken_up_without_its_rng_states(
    tiny_hf: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's generators have 16 bytes, a CPU's 5,056, and there is one more: they cannot be read into each other."""
    from megatron_xmtf.checkpoint import state

    [(on_cpu, on_gpu)] = run_ranks(layouts_with_and_without_a_gpu, world_size=1)
    assert on_cpu == {"tp": 1, "pp": 1, "dp": 1} and on_gpu == {**on_cpu, "cuda": 1}
    rng_states = state._rng_states

    def gpu_states() -> dict[str, Any]:
        few = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
        named = {**rng_states(), "rng.cuda": rng_states()["rng.torch"]}
        # The shape of the ShardedTensor that from_rank_offsets makes of 16 bytes.
        return {
            name: type(entry).from_rank_offsets(name, few, (0, 0, 1), (1, 0, 1), (2, 0, 1))
            for name, entry in named.items()
        }

    if torch.cuda.is_available():
        pytest.skip("this machine writes checkpoints of a GPU itself")
    sections: dict[str, Any] = {"model": str(tiny_hf), "schedule": SCHEDULE, "checkpoint": {"save_interval": N}}
    config = run_config(**sections)
    with monkeypatch.context() as patch:
        patch.setattr(state, "current_layout", lambda: on_gpu)
        patch.setattr(state, "_rng_states", gpu_states)
        whole = train_to(config, 1)
    output = Path(config.output).with_name("resumed")
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "checkpoints" / f"step_{2 * N:07d}")
    resumed = train_to(run_config(output=str(output), **sections), 1)
    assert resumed[2 * N]["loss"] == whole[2 * N]["loss"], "without dropout no state is drawn from"


def rank_rows(prepared: Any, steps: int) -> list[list[list[int]]]:
    """Return the example ids of every row of each step that this data-parallel rank reads."""
    from megatron_xmtf.data.loader import BatchLoader
    from megatron_xmtf.parallel.topology import initialize_parallel

    topology = initialize_parallel(prepared.config.parallel, seed=1)
    batch = prepared.config.batch
    loader = BatchLoader(
        open_training_rows(prepared),
        micro_batch_size=batch.micro_batch_size,
        step_rows=batch.step_rows,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        normalization=prepared.config.loss.normalization,
    )
    return [
        [[int(i) for i in row.example_ids] for micro in loader.micro_batches(step) for row in micro.rows]
        for step in range(steps)
    ]


def test_the_same_rows_are_read_at_each_step_whatever_the_ranks(run_config: Callable[..., RunConfig]) -> None:
    read = {}
    for world_size in (1, 2, 4):
        prepared = prepare_run(run_config(), world_size=world_size)
        ranks = run_ranks(rank_rows, world_size=world_size, arguments=(prepared, 6))
        read[world_size] = [sorted(row for rank in ranks for row in rank[step]) for step in range(6)]
    assert read[1] == read[2] == read[4]
    assert all(len(rows) == 8 for rows in read[1])
    assert len({json.dumps(rows) for rows in read[1]}) == 6, "every step reads other rows"


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("seed", {"seed": 7}, "seed: 42 -> 7"),
    ("optimizer.adam_beta1", {"optimizer": {"lr": 1e-3, "adam_beta1": 0.8}}, "optimizer.adam_beta1: 0.9 -> 0.8"),
    ("optimizer.lr", {"optimizer": {"lr": 2e-3}}, "optimizer.lr: 0.001 -> 0.002"),
    (
        "batch.sequence_length",
        {"batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 128}},
        "batch.sequence_length: 64 -> 128",
    ),
]


@pytest.fixture(scope="module")
def short_run(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of one step in one process."""
    from tests.conftest import make_run_config

    make = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("short"))
    config = make(schedule={"train_steps": 2}, checkpoint={"save_interval": 1})
    train_to(config, 1)
    return make, Path(config.output)


@pytest.mark.parametrize(("key", "sections", "words"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_change_is_shown_refused_and_taken_when_allowed(
    key: str, sections: dict[str, Any], words: str, short_run: Any
) -> None:
    make, output = short_run
    config = make(output=str(output), schedule={"train_steps": 2}, **sections)
    with pytest.raises(ConfigMismatchError) as caught:
        prepare_run(config, world_size=1)
    assert words in str(caught.value) and f"--allow-change {key}" in str(caught.value)
    assert caught.value.exit_code == 4
    assert prepare_run(config, world_size=1, allowed_changes=[key]).start.step == 2


def test_a_changed_mixture_is_refused(short_run: Any, tiny_pairs: Path) -> None:
    make, output = short_run
    data = {"train": [{"prefix": str(tiny_pairs), "weight": 1.0}, {"prefix": str(tiny_pairs), "weight": 2.0}]}
    with pytest.raises(ConfigMismatchError, match=r"data\.train\.1\.prefix: None -> "):
        prepare_run(make(output=str(output), schedule={"train_steps": 2}, data=data), world_size=1)


def test_an_altered_tokenizer_is_refused_before_it_is_read(short_run: Any, tmp_path: Path) -> None:
    make, output = short_run
    copy = shutil.copytree(output, tmp_path / "run")
    path = copy / "checkpoints" / "step_0000002" / "hf" / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"a"', '"Q"', 1).replace('"b"', '"a"', 1).replace('"Q"', '"b"', 1), encoding="utf-8")
    assert path.stat().st_size == len(text.encode()) and path.read_text(encoding="utf-8") != text
    with pytest.raises(CorruptCheckpointError, match="hf/tokenizer.json was altered"):
        prepare_run(make(output=str(copy), schedule={"train_steps": 2}), world_size=1)


def flip_one_bit(checkpoint: Path) -> Path:
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = np.fromfile(shard, dtype=np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(shard)
    return shard


def test_a_flipped_bit_is_an_error_with_latest_and_a_step_back_with_latest_valid(
    short_run: Any, tmp_path: Path
) -> None:
    make, output = short_run
    copy = shutil.copytree(output, tmp_path / "run")
    shard = flip_one_bit(copy / "checkpoints" / "step_0000002")
    schedule = {"train_steps": 3}
    prepared = prepare_run(make(output=str(copy), schedule=schedule), world_size=2)
    with pytest.raises(CorruptCheckpointError, match=f"{shard.name} was altered"):
        run_ranks(train_rank, world_size=2, arguments=(prepared,))
    again = make(output=str(copy), schedule=schedule, checkpoint={"resume": "latest_valid"})
    prepared = prepare_run(again, world_size=2)
    assert (prepared.start.step, prepared.start.verified) == (1, True)
    run_ranks(train_rank, world_size=2, arguments=(prepared,))
    assert list(read_metrics(copy)) == [1, 2, 3]
    assert (copy / "checkpoints" / "damaged_step_0000002").is_dir()
