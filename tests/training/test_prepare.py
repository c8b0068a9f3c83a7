"""What is checked and built once, and what each rank opens after that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data import packing_index
from megatron_xmtf.errors import DatasetError
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
