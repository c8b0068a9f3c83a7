"""Waves of tiles, worked out by hand, and what a search's networks do with rings and borders of stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_xmtf.planning.cluster import PRESETS
from megatron_xmtf.planning.communication import data_traffic, pipeline_traffic, tensor_traffic
from megatron_xmtf.planning.matrix_products import linear_flops, wave_factor
from megatron_xmtf.planning.time_model import step_time
from tests.planning.published_runs import BLOOM, BLOOMZ

JEAN_ZAY = PRESETS["jean-zay-a100-80"]


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [
        (256 * 12, 128 * 9, 1.0),  # 108 tiles: one whole wave
        (128 * 12, 256 * 9, 1.0),  # the other orientation
        (256 * 12, 128 * 10, 2 * 108 / 120),  # twelve tiles more make a second wave
        (256, 128, 108.0),  # one tile: one of 108 multiprocessors works
        (4096, 5376, 7 * 108 / (16 * 42)),  # BLOOM's QKV at TP8, two rows: 6.2 waves
        (4096, 10752, 13 * 108 / (16 * 84)),  # at TP4
    ],
)
def test_waves(rows: int, columns: int, wanted: float) -> None:
    assert wave_factor(rows, columns, multiprocessors=108) == pytest.approx(wanted)


def test_a_linear_layer_is_three_products() -> None:
    """Two of them [3,072, 1,152] and [1,152, 3,072], which fill one wave each; the third [3,072, 3,072] in three."""
    tokens, inputs, outputs = 3072, 1152, 3072
    whole = 2 * tokens * inputs * outputs
    forward, backward = linear_flops(tokens, inputs, outputs, multiprocessors=108)
    assert forward == pytest.approx(whole * 3 * 108 / (12 * 24))
    assert backward == pytest.approx(whole * 2)
    assert linear_flops(0, inputs, outputs, multiprocessors=108) == (0.0, 0.0)


def test_rings_share_what_a_node_sends() -> None:
    """BLOOM's gradients: four rings go through each node. With TP8 eight do, and with TP1 one."""
    parameters = 10**9
    for tp, pp in ((1, 48), (4, 12), (8, 6)):
        parallel = BLOOM.layout.parallel.model_copy(
            update={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        )
        layout = replace(BLOOM.layout, parallel=parallel, gpus=tp * pp * 16)
        sent = data_traffic(layout, JEAN_ZAY, parameters=parameters)
        # fp32 gradients all-reduced, half-precision weights gathered: 15/16 of 10 bytes.
        assert sent.gigabytes == pytest.approx(15 / 16 * 10)
        assert sent.seconds == pytest.approx(sent.gigabytes * tp / (50 * JEAN_ZAY.ring_fraction))


def test_a_sum_waits_for_each_hop() -> None:
    """2 (t - 1) hops a sum; 3/4 of the bytes twice over NVLink."""
    sent = tensor_traffic(BLOOM.layout, JEAN_ZAY, reduced_bytes=1e9, sums=4)
    assert sent.gigabytes == pytest.approx(1.5)
    assert sent.seconds == pytest.approx(1.5 / 230 + 4 * 6 * JEAN_ZAY.hop_ms / 1e3)


def test_neighbours_in_one_node_hand_over_by_nvlink() -> None:
    """BLOOMZ's layout has two stages of four ranks in a node: every second border is within one."""
    found = [pipeline_traffic(BLOOMZ.architecture, BLOOMZ.layout, JEAN_ZAY, border=border) for border in range(71)]
    size = 2048 * 14336 * 2 / 1e9
    assert [one.seconds for one in found[:3]] == pytest.approx([size / 230, size / 12.5, size / 230])
    # In DeepSpeed's schedule each stage but the ends hands over and takes, at both borders, in turn.
    time = step_time(BLOOMZ.architecture, BLOOMZ.layout, JEAN_ZAY)
    middle, last = time.chunks[1][0], time.chunks[-1][0]
    assert middle.pipeline == pytest.approx(2 * (size / 230 + size / 12.5))
    assert last.pipeline == pytest.approx(2 * size / 230)
