"""What is checked and built once, and what each rank opens after that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data import packing_index
from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.files import sha256_file
from megatron_xmtf.training.prepare import open_training_rows, prepare_run


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose SHA-256 is computed when an index is opened or written."""
    names: list[str] = []

    def record(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(packing_index, "sha256_file", record)
    return names


def test_the_index_is_verified_once_and_the_ranks_only_map_it(
    run_config: Callable[..., RunConfig], hashed: list[str]
) -> None:
    config = run_config()
    prepare_run(config, world_size=1)  # builds it
    hashed.clear()
    prepared = prepare_run(config, world_size=1)
    assert sorted(hashed) == ["dataset_ids.npy", "example_ids.npy", "row_offsets.npy"]
    hashed.clear()
    of_another_rank = prepare_run(config, world_size=1, packing_key=prepared.packing_key)
    rows = open_training_rows(of_another_rank)
    assert hashed == []
    assert isinstance(rows.index.example_ids, np.memmap) and rows.index.key == prepared.packing_key
    assert len(rows) >= 20 * 8 and rows[0].segment_ids[0] == 1


def test_a_rank_that_finds_no_index_says_so(run_config: Callable[..., RunConfig]) -> None:
    prepared = prepare_run(run_config(), world_size=1, packing_key="0" * 64)
    with pytest.raises(DatasetError, match="there is no packing index .*0000000000000000; .*xmtf pack CONFIG"):
        open_training_rows(prepared)


@pytest.mark.parametrize(
    ("micro", "ramp", "world_size", "words"),
    [
        (2, {"start": 6, "increment": 2, "rows": 12}, 4, "start=6 is not a multiple of .* = 2 x 2; use 4 or 8"),
        (
            1,
            {"start": 2, "increment": 2, "rows": 12},
            4,
            "1 micro-batches a step .* that is a multiple of 4, and a ramp",
        ),
        (
            1,
            {"start": 4, "increment": 2, "rows": 12},
            4,
            "3 micro-batches a step .* that is a multiple of 4, and a ramp",
        ),
        (1, {"start": 4, "increment": 4, "rows": 12}, 4, None),
    ],
)
def test_every_size_of_a_batch_size_ramp_must_fit_the_layout(
    micro: int, ramp: dict[str, int], world_size: int, words: str | None, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(
        batch={
            "micro_batch_size": micro,
            "global_batch_size": 12,
            "sequence_length": 64,
            "rampup_batch_size": ramp,
        },
        parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    )
    if words is None:
        prepare_run(config, world_size=world_size)
        return
    with pytest.raises(ConfigError, match=words.replace("a ramp", "a rampup_batch_size")):
        prepare_run(config, world_size=world_size)
