"""Save at one layout, go on at another: the curve continues as if nothing had happened, optimizer state included."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from megatron_xmtf.checkpoint import sharded
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import (
    CheckpointError,
    ConfigError,
    ConfigMismatchError,
    CorruptCheckpointError,
    DiskFullError,
    ExitCode,
    MissingError,
    RankFailedError,
)
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.launch import train
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer, train_rank
from tests.layouts import PP, TP

STEPS, STOP = 12, 6
DP = "use_distributed_optimizer"
TOLERANCE = 1e-5
SAVED_AT: dict[str, Any] = {TP: 2, PP: 2, "use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1-PP1-DP2": (2, {"use_distributed_optimizer": True}),
    "TP4": (4, {TP: 4, "use_distributed_optimizer": True}),
    "PP4": (4, {PP: 4, "use_distributed_optimizer": True}),
    "PP6-counted": (
        6,  # stages of 0, 1, 1, 1, 1, 0 layers
        {
            PP: 6,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "use_distributed_optimizer": True,
        },
    ),
    "PP2-VPP2-SP": (
        4,
        {
            TP: 2,
            PP: 2,
            "virtual_pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
        },
    ),
    "one process": (1, {"use_distributed_optimizer": True}),
}


def read_metrics(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def train_to(config: RunConfig, world_size: int) -> dict[int, dict[str, Any]]:
    prepared = prepare_run(config, world_size=world_size)
    run_ranks(train_rank, world_size=world_size, arguments=(prepared,))
    return read_metrics(Path(config.output))


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run at TP2 x PP2 that leaves a checkpoint at step 6 and at step 12."""
    from tests.conftest import make_run_config

    make = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("whole"))
    config = make(parallel=SAVED_AT, schedule={"train_steps": STEPS}, checkpoint={"save_interval": STOP})
    return make, config, train_to(config, 4)


def resumed(whole: Any, tmp_path: Path, world_size: int, section: dict[str, Any], **sections: Any) -> Any:
    """Copy the run as it was at step 6, go on at another layout, return its metrics."""
    make, config, _ = whole
    output = tmp_path / "resumed"
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:07d}")
    values = {"schedule": {"train_steps": STEPS}, **sections}
    return output, make(output=str(output), parallel=section, **values), world_size


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_goes_on_at_another_layout(name: str, whole: Any, tmp_path: Path) -> None:
    _, config, world_size = resumed(whole, tmp_path, *LAYOUTS[name])
    metrics = train_to(config, world_size)
    assert list(metrics) == list(range(1, STEPS + 1)), "metrics of steps after the resumed one were cut off"
    for step in range(STOP + 1, STEPS + 1):
        assert metrics[step]["loss"] == pytest.approx(whole[2][step]["loss"], rel=TOLERANCE), f"step {step}"
        assert metrics[step]["grad_norm"] == pytest.approx(whole[2][step]["grad_norm"], rel=10 * TOLERANCE)
    finished = f"checkpoints/step_{STEPS:07d}"
    ours, theirs = read_tensors(Path(config.output) / finished), read_tensors(Path(whole[1].output) / finished)
    shapes = [{name: t.shape for name, t in tensors.items() if "rng" not in name} for tensors in (ours, theirs)]
    assert shapes[0] == shapes[1], "a checkpoint does not show the layout that wrote it"


def test_the_same_layout_is_bit_identical(whole: Any, tmp_path: Path) -> None:
    output, config, world_size = resumed(whole, tmp_path, 4, SAVED_AT)
    metrics = train_to(config, world_size)
    for step in range(STOP + 1, STEPS + 1):
        for key in ("loss", "grad_norm", "learning_rate", "rows", "tokens", "target_tokens"):
            assert metrics[step][key] == whole[2][step][key], f"{key} of step {step}"
    finished = f"checkpoints/step_{STEPS:07d}"
    ours, theirs = read_tensors(output / finished), read_tensors(Path(whole[1].output) / finished)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(checkpoint).read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return state


def rank_dropout(prepared: PreparedRun) -> tuple[list[bool], list[bool]]:
    """Return the masks that one rank draws for what is whole on it and for its part of the heads."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    initialize_parallel(prepared.config.parallel, seed=1)
    whole_mask = torch.dropout(torch.ones(200), 0.5, train=True) > 0
    with get_cuda_rng_tracker().fork():
        part_mask = torch.dropout(torch.ones(200), 0.5, train=True) > 0
    return whole_mask.tolist(), part_mask.tolist()


def test_data_parallel_ranks_draw_their_own_dropout(run_config: Callable[..., RunConfig]) -> None:
    prepared = prepare_run(run_config(parallel={TP: 2}), world_size=4)
    # Ranks 0 and 1 are the tensor-parallel pair of the first copy of the model, 2 and 3 that of the second.
    masks = run_ranks(rank_dropout, world_size=4, arguments=(prepared,))
    assert masks[0][0] == masks[1][0] and masks[2][0] == masks[3][0], "what is whole on both ranks is masked alike"
    assert masks[0][0] != masks[2][0], "each copy of the model masks its own rows"
    assert len({tuple(part) for _, part in masks}) == 4


def test_dropout_goes_on_bit_identical(tiny_hf: Path, tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    model = shutil.copytree(tiny_hf, tmp_path / "dropout")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "hidden_dropout": 0.1, "attention_dropout": 0.1}))
    sections: dict[str, Any] = {
        "model": str(model),
        "parallel": {TP: 2, "use_distributed_optimizer": True},
        "schedule": {"train_steps": 8},
        "checkpoint": {"save_interval": 4},
    }
    config = run_config(**sections)
    whole_metrics = train_to(config, 4)
    shutil.rmtree(Path(config.output) / "checkpoints" / "step_0000008")
    metrics = train_to(config, 4)
    for step in range(5, 9):
        assert metrics[step]["loss"] == whole_metrics[step]["loss"], f"step {step}"
        assert metrics[step]["grad_norm"] == whole_metrics[step]["grad_norm"], f"step {step}"


def test_a_checkpoint_holds_moments_in_the_shape_of_their_parameters(whole: Any) -> None:
    tensors = read_tensors(Path(whole[1].output) / "checkpoints" / f"step_{STEPS:07d}")
    weights = [key for key in tensors if not key.startswith(("optimizer.", "rng."))]
    assert weights
    for key in weights:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert tensors[f"optimizer.state.{moment}.{key}"].shape == tensors[key].shape


def test_without_distributed_optimizer(
    tiny_checkpoint: Path, tiny_pairs: Path, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    sections: dict[str, Any] = {"checkpoint": {"save_interval": STOP}}
    config = run_config(parallel={TP: 2}, schedule={"train_steps": STEPS}, **sections)
    whole_metrics = train_to(config, 2)
    shutil.rmtree(Path(config.output) / "checkpoints" / f"step_{STEPS:07d}")
    again = run_config(parallel={PP: 2}, schedule={"train_steps": STEPS}, **sections)
    metrics = train_to(again, 2)
    for step in range(STOP + 1, STEPS + 1):
        assert metrics[step]["loss"] == pytest.approx(whole_metrics[step]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_that_ends_during_a_load_is_not_taken_for_a_damaged_checkpoint(
    wrapped: bool, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What gloo raises on the others, bare or among the causes of torch's own error.
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:28045")
    failure = CheckpointException("cannot read", {0: _wrap_exception(lost)}) if wrapped else lost

    def load(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(sharded.dist_checkpointing, "load", load)  # the rank is a fork of this process
    _, config, _ = resumed(whole, tmp_path, 1, {})
    with pytest.raises(RankFailedError, match="another rank ended while .* was loaded") as caught:
        train_to(config, 1)
    assert caught.value.exit_code == ExitCode.FAILED


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("before", [True, False])
def test_the_distributed_optimizer_may_be_switched(
    before: bool, precision: str, run_config: Callable[..., RunConfig]
) -> None:
    sections: dict[str, Any] = {"precision": precision, "checkpoint": {"save_interval": 3}}
    first, second = ({DP: before}, {DP: not before})
    whole = train_to(run_config(parallel=first, schedule={"train_steps": 6}, **sections), 2)
    again = run_config(parallel=second, schedule={"train_steps": 6}, **sections)
    shutil.rmtree(Path(again.output) / "checkpoints" / "step_0000006")
    metrics = train_to(again, 2)
    # In bf16 the sums over ranks are rounded in another order.
    tolerance = TOLERANCE if precision == "fp32" else 1e-3
    for step in range(4, 7):
        assert metrics[step]["loss"] == pytest.approx(whole[step]["loss"], rel=tolerance)
        assert metrics[step]["learning_rate"] == whole[step]["learning_rate"]


def test_a_changed_setting_is_refused_unless_allowed(whole: Any, tmp_path: Path) -> None:
    _, config, world_size = resumed(whole, tmp_path, 4, SAVED_AT, optimizer={"lr": 5e-4})
    with pytest.raises(ConfigMismatchError, match=r"optimizer.lr: 0.001 -> 0.0005"):
        prepare_run(config, world_size=world_size)
    prepare_run(config, world_size=world_size, allowed_changes=["optimizer.lr"])


def rank_groups(prepared: PreparedRun) -> list[tuple[float, tuple[float, float], float]]:
    """Build a trainer in one rank and return weight decay, betas and eps of its parameter groups."""
    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    groups = trainer.optimizer.param_groups
    return sorted({(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups})


def test_an_allowed_change_takes_effect(whole: Any, tmp_path: Path) -> None:
    changed = {"lr": 1e-3, "weight_decay": 0.5, "adam_beta2": 0.5, "adam_eps": 1e-6}
    _, config, world_size = resumed(whole, tmp_path, 4, SAVED_AT, optimizer=changed)
    prepared = prepare_run(config, world_size=world_size, allowed_changes=["optimizer"])
    for groups in run_ranks(rank_groups, world_size=world_size, arguments=(prepared,)):
        assert groups == [(0.0, (0.9, 0.5), 1e-6), (0.5, (0.9, 0.5), 1e-6)]


def test_a_missing_step_is_an_error(whole: Any, tmp_path: Path) -> None:
    _, config, world_size = resumed(whole, tmp_path, 4, SAVED_AT, checkpoint={"resume": 9})
    with pytest.raises(MissingError, match="no finished checkpoint of step 9"):
        prepare_run(config, world_size=world_size)


def test_going_back_behind_a_later_checkpoint_is_refused_before_anything_is_trained(whole: Any, tmp_path: Path) -> None:
    make, config, _ = whole
    again = make(output=config.output, parallel=SAVED_AT, checkpoint={"resume": STOP})
    with pytest.raises(ConfigError, match=f"resume={STOP} would train again .*steps {STEPS}"):
        prepare_run(again, world_size=4)


def test_a_resumed_run_outlives_the_checkpoint_it_started_from(run_config: Callable[..., RunConfig]) -> None:
    def config(steps: int) -> RunConfig:
        return run_config(schedule={"train_steps": steps}, checkpoint={"save_interval": 1, "keep_last": 2})

    train_to(config(1), 1)
    metrics = train_to(config(4), 1)  # step 1 is pruned after step 3; its tokenizer files are needed at step 4 as well
    assert list(metrics) == [1, 2, 3, 4]
    checkpoints = Path(config(4).output) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_0000003", "step_0000004"]
    assert (checkpoints / "step_0000004" / "hf" / "tokenizer.json").is_file()


def test_a_damaged_checkpoint_is_refused(whole: Any, tmp_path: Path) -> None:
    output, config, world_size = resumed(whole, tmp_path, 4, SAVED_AT)
    shard = next((output / "checkpoints" / f"step_{STOP:07d}").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CorruptCheckpointError, match="bytes instead of"):
        prepare_run(config, world_size=world_size)


def test_an_imported_model_cannot_be_resumed_as_a_run(
    tiny_checkpoint: Path, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config()
    target = Path(config.output) / "checkpoints" / "step_0000000"
    shutil.copytree(tiny_checkpoint, target)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        train(config)


def fill_the_disk(prepared: PreparedRun) -> None:
    """Train in one rank whose disk is full when its writer process flushes a shard."""
    rank, fsync = os.getpid(), os.fsync

    def no_space(descriptor: int) -> None:
        if os.getpid() != rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = no_space
    train_rank(prepared)


def test_a_full_disk_has_its_own_error_and_leaves_the_checkpoint_before(
    run_config: Callable[..., RunConfig],
) -> None:
    train_to(run_config(schedule={"train_steps": 1}), 2)
    prepared = prepare_run(run_config(schedule={"train_steps": 2}), world_size=2)
    with pytest.raises(DiskFullError, match="step_0000002 could not be written: rank [01]: .*No space left"):
        run_ranks(fill_the_disk, world_size=2, arguments=(prepared,))
    checkpoints = Path(prepared.config.output) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_0000001"]
