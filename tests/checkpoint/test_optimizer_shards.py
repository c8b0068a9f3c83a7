"""Boxes of the distributed optimizer's state: they tile what they should, and hold what Megatron-Core gathers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.checkpoint.optimizer_shards import StateBox, flat_boxes, read_boxes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.errors import CorruptCheckpointError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from tests.layouts import TP
from tests.torch_dist_files import write_chunks

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_boxes_are_the_stretch_in_its_order(data: st.DataObject, shape: list[int]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    boxes = list(flat_boxes(start, end, shape))
    found = [
        number
        for offsets, sizes in boxes
        for number in whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten().tolist()
    ]
    assert found == list(range(start, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1), "a stretch of a matrix is at most three boxes"


def test_a_stretch_of_a_matrix_by_hand() -> None:
    assert list(flat_boxes(0, 7, (4, 3))) == [((0, 0), (2, 3)), ((2, 0), (1, 1))]
    assert list(flat_boxes(7, 12, (4, 3))) == [((2, 1), (1, 2)), ((3, 0), (1, 3))]
    assert list(flat_boxes(4, 5, (4, 3))) == [((1, 1), (1, 1))]
    assert list(flat_boxes(3, 3, (4, 3))) == []


def box(data: torch.Tensor, offsets: tuple[int, ...], key: str = "m") -> StateBox:
    return StateBox(key=key, shape=(6, 4), offsets=offsets, data=data, is_main=True)


def test_a_box_is_read_out_of_chunks_that_lie_otherwise(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    boxes = ((slice(0, 2), slice(0, 4)), (slice(2, 6), slice(0, 3)), (slice(2, 6), slice(3, 4)))
    write_chunks(tmp_path, [("m", whole[one], (one[0].start, one[1].start), (6, 4)) for one in boxes])
    within, padded = torch.full((3, 3), -1.0), torch.full((3, 4), -1.0)
    with CheckpointReader(tmp_path) as reader:
        read_boxes(reader, [box(within, (1, 1)), box(padded, (5, 0))])
        assert torch.equal(within, whole[1:4, 1:4])
        assert torch.equal(padded, torch.cat([whole[5:], torch.full((2, 4), -1.0)])), "rows of padding keep theirs"
        with pytest.raises(CorruptCheckpointError, match="no tensor n of 2 dimensions"):
            read_boxes(reader, [box(within, (0, 0), key="n")])


def rank_stores(directory: Path, precision: str) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Train two steps at TP2 x DP2, save; return offset and tensor of each moment as Megatron-Core gathers it."""
    from megatron.core import parallel_state

    from tests.parallel.tiny_engine import SHARDING, build_engine, run_config, save_checkpoint, tiny_batches

    config = run_config(**{TP: 2}, use_distributed_optimizer=True).model_copy(update={"precision": precision})
    topology = initialize_parallel(config.parallel, seed=1)
    engine = build_engine(config)
    for step in range(2):
        engine.train_step(tiny_batches(2, skip=4 * step + 2 * topology.dp_rank))
    save_checkpoint(engine, directory / "step_0000002", side_files=directory)
    model = engine.chunks[0].module.sharded_state_dict(metadata=dict(SHARDING))
    model = {name: value for name, value in model.items() if not name.endswith("_extra_state")}
    gathered: dict[int, dict[str, Any]] = engine.optimizer.sharded_state_dict(model, metadata=dict(SHARDING))[
        "param_state"
    ]
    assert parallel_state.get_data_parallel_world_size() == 2
    return {
        sharded.key.replace(".param.", ".fp32_param."): (tuple(sharded.global_offset), sharded.data.clone())
        for state in gathered.values()
        for sharded in state.values()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_boxes_hold_what_megatron_core_gathers(precision: str, tmp_path: Path) -> None:
    ranks = run_ranks(rank_stores, world_size=4, arguments=(tmp_path, precision))
    compared = set()
    with CheckpointReader(tmp_path / "step_0000002") as reader:
        for gathered in ranks:
            for key, (offset, expected) in gathered.items():
                if key not in reader.tensors:
                    # The weights themselves: an fp32 run's main parameters.
                    assert ".fp32_param." in key and precision == "fp32"
                    key = key.removeprefix("optimizer.state.fp32_param.")
                found = torch.zeros_like(expected)
                reader.read_into(key, found, offsets=offset)
                assert torch.equal(found, expected), key
                assert expected.dim() < 2 or expected.abs().max() > 0, f"{key} tells nothing"
                compared.add(key)
        missing = {key for key in reader.tensors if key.startswith("optimizer.")} - compared
    assert not missing
    assert len(compared) > 3 * 40
