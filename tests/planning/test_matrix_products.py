"""Waves of tiles, worked out by hand, and what a search's networks do with rings and borders of stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_xmtf.config.parallel import RecomputeConfig
from megatron_xmtf.planning.chunk_time import chunk_time
from megatron_xmtf.planning.cluster import PRESETS
from megatron_xmtf.planning.communication import data_traffic, pipeline_traffic, tensor_traffic
from megatron_xmtf.planning.engine import ENGINES, MEGATRON_CORE
from megatron_xmtf.planning.matrix_products import attention_flops, linear_flops, wave_factor
from megatron_xmtf.planning.model_shape import ChunkShape
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
    forward, of_inputs, of_weights = linear_flops(tokens, inputs, outputs, multiprocessors=108, shortest_piece=612)
    assert forward == pytest.approx(whole * 3 * 108 / (12 * 24))
    assert of_inputs == of_weights == pytest.approx(whole)
    assert linear_flops(0, inputs, outputs, multiprocessors=108, shortest_piece=612) == (0.0, 0.0, 0.0)


def test_few_tiles_with_much_to_sum_are_cut() -> None:
    """The head of BLOOM-560m at 410 positions: 2 x 8 tiles of [410, 1,024], six pieces of each, 96 of 108 at work.

    Its weight's gradient sums over 410 positions alone, too few to cut, and has tiles enough.
    """
    whole = 2 * 410 * 1024 * 250_880
    forward, of_inputs, of_weights = linear_flops(410, 1024, 250_880, multiprocessors=108, shortest_piece=612)
    assert of_inputs == pytest.approx(whole * 108 / 96 * 512 / 410)
    assert wave_factor(410, 1024, multiprocessors=108) == pytest.approx(108 / 16 * 512 / 410)
    for got, (rows, columns) in ((forward, (410, 250_880)), (of_weights, (1024, 250_880))):
        assert got == pytest.approx(whole * wave_factor(rows, columns, multiprocessors=108))
    # 1,024 to sum are one piece of 612 and more; 1,224 two, and 16 tiles become 32 of half the length.
    for depth, pieces in ((1024, 1), (1224, 2)):
        forward, _, _ = linear_flops(410, depth, 1024, multiprocessors=108, shortest_piece=612)
        assert forward == pytest.approx(2 * 410 * 1024 * depth * 108 / 16 * 512 / 410 / pieces)


def test_attention_is_six_products_of_all_heads() -> None:
    """27 heads of 128 columns: values [27 x 256, 128] fill 27 tiles, scores [27 x 256, 512] one wave of 108.

    Heads of 144 leave 112 columns of a second tile empty: 54 tiles, still half a wave, for 9/8 of the work.
    """
    for head_dim in (128, 144):
        whole = 2 * 27 * 256 * 512 * head_dim
        scores, values, backward = attention_flops(27, 256, 512, head_dim, multiprocessors=108)
        assert scores == pytest.approx(whole)
        assert values == pytest.approx(whole * 108 * 256 * 128 / (27 * 256 * head_dim))
        # Scores and queries have 256 rows a head; keys and values 512, and 54 tiles, or 108.
        of_keys = 108 * 256 * 128 / (27 * 512 * head_dim)
        assert backward == pytest.approx(scores + values + 2 * whole * of_keys)


def test_heads_of_108_run_without_tensor_cores() -> None:
    """Rows of 216 bytes: 16 operations a number of [heads, s, s, head_dim], forward twice, at 0.536 of 19.5 TFLOP/s.

    Heads of 112 (224 bytes, 14 times 16) are taken.
    """
    cluster = JEAN_ZAY.model_copy(update={"fp32_tflops": 19.5, "unaligned_fraction": 0.536})
    found = {}
    for heads, hidden in ((128, 13_824), (128, 14_336)):
        run = replace(BLOOM, hidden=hidden, heads=heads)
        chunk = ChunkShape(layers=(("causal", 1),), embeds=False, answers=False)
        slow, fast = (
            chunk_time(run.architecture, chunk, run.layout, one).matmul
            for one in (cluster, cluster.model_copy(update={"unaligned_fraction": 1.0}))
        )
        found[hidden] = slow - fast
    flops = 4 * 4 * 2 * (128 / 4) * 2048**2 * 108
    assert found[13_824] == pytest.approx(flops / 19.5e12 * (1 / 0.536 - 1))
    assert found[14_336] == 0.0


@pytest.mark.parametrize(("gb_per_second", "sequence_parallel"), [(230.0, False), (230.0, True), (1.0, False)])
def test_ours_sums_behind_the_weights_gradient(gb_per_second: float, sequence_parallel: bool) -> None:
    """Of the backward pass's two sums nothing is seen at NVLink's rate; a gather of half a sum each beside sequences.

    Over a link as slow as 1 GB/s a sum outlasts the product: what is left of it is seen.
    """
    cluster = JEAN_ZAY.model_copy(update={"intra_node_gb_per_second": gb_per_second, "hop_ms": 0.0})
    parallel = BLOOM.layout.parallel.model_copy(update={"sequence_parallel": sequence_parallel})
    layout = replace(BLOOM.layout, parallel=parallel, engine=MEGATRON_CORE, recompute=RecomputeConfig())
    chunk = ChunkShape(layers=(("causal", 1),), embeds=False, answers=False)
    time = chunk_time(BLOOM.architecture, chunk, layout, cluster)
    # 2 x 3/4 of 4,096 x 14,336 numbers of two bytes.
    sent = 1.5 * 4096 * 14_336 * 2 / 1e9
    exposed = {(230.0, False): 2 * sent / 230, (230.0, True): 3 * sent / 230}
    if gb_per_second == 1.0:
        products = [
            linear_flops(4096, 14_336, outputs, multiprocessors=108, shortest_piece=612)[2]
            for outputs in (10_752, 14_336)
        ]
        wanted = 4 * sent - sum(products) / (312e12 * cluster.matmul_fraction)
    else:
        wanted = exposed[gb_per_second, sequence_parallel]
    assert time.tensor == pytest.approx(wanted)
    assert time.tensor_gigabytes == pytest.approx((5 if sequence_parallel else 4) * sent)
    theirs = chunk_time(BLOOM.architecture, chunk, replace(layout, engine=ENGINES["deepspeed_bf16"]), cluster)
    assert theirs.tensor == pytest.approx(4 * sent / gb_per_second)


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
