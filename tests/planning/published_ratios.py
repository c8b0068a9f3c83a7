"""Published rows that can be compared with their neighbours alone: another machine, or seconds by another formula.

Until 2022-02-24 the nodes' PCIe was slow: the same layout took 4 to 6 % longer than on 02-25. Within one table of a day
or two the seconds of two rows still say what a change of layout did. All in fp16, with whole layers recomputed.

Source:  bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md, tables of 02-17 to 02-24.
"""

from __future__ import annotations

from tests.planning.published_runs import FP16, PublishedRun


def _run(
    name: str, shape: tuple[int, int, int], nodes: int, layout: tuple[int, int, int], gbs: int, *published: float | None
) -> PublishedRun:
    """Return a row: (hidden, layers, heads), nodes, (tp, pp, mbs), global batch; seconds, TFLOP/s, GiB."""
    hidden, layers, heads = shape
    tp, pp, mbs = layout
    seconds, tflops, memory = published
    return PublishedRun(name, hidden, layers, heads, 8 * nodes, tp, pp, mbs, gbs, seconds, tflops, memory, engine=FP16)


A194, A200, A187 = (14400, 78, 96), (14400, 80, 96), (13824, 80, 96)
A181, A196, A177 = (14336, 72, 64), (13824, 84, 64), (12288, 96, 64)
A182, A182_84 = (13824, 78, 64), (13312, 84, 64)

MICRO_BATCHES = {
    "194B TP8 PP6": [
        _run("194B MBS2", A194, 48, (8, 6, 2), 2048, 172.36, 98.43, 45),
        _run("194B MBS1", A194, 48, (8, 6, 1), 2048, 183.64, 92.38, 39),
        _run("194B MBS4", A194, 48, (8, 6, 4), 2048, 173.92, 97.55, 56),
        _run("194B MBS8", A194, 48, (8, 6, 8), 2048, 192.42, 88.17, 75),
    ],
    "200B TP8 PP10": [
        _run("200B MBS2", A200, 40, (8, 10, 2), 2048, 207.92, 100.43, 43),
        _run("200B MBS1", A200, 40, (8, 10, 1), 2048, 221.21, 94.39, 35),
        _run("200B MBS4", A200, 40, (8, 10, 4), 2048, 208.18, 100.30, 55),
        _run("200B MBS8", A200, 40, (8, 10, 8), 2048, 229.69, 90.91, 76),
    ],
    "187B TP8 PP10": [
        _run("187B MBS2", A187, 40, (8, 10, 2), 2048, 151.07, 127.38, 39),
        _run("187B MBS1", A187, 40, (8, 10, 1), 2048, 160.29, 120.05, 33),
        _run("187B MBS4", A187, 40, (8, 10, 4), 2048, 147.43, 130.53, 53),
        _run("187B MBS8", A187, 40, (8, 10, 8), 2048, 152.51, 126.18, 73),
    ],
    "181B TP8 PP12": [
        _run("181B PP12 MBS2", A181, 48, (8, 12, 2), 2048, 134.02, 120.29, 37),
        _run("181B PP12 MBS1", A181, 48, (8, 12, 1), 2048, 143.31, 112.49, 29),
        _run("181B PP12 MBS4", A181, 48, (8, 12, 4), 2048, 123.69, 130.34, 49),
        _run("181B PP12 MBS8", A181, 48, (8, 12, 8), 2048, 129.26, 124.72, 69),
    ],
}
"""The first row of each table is what the others are divided by. Until 02-20 (194B, 200B, 187B) the logs' TFLOP/s count
8 operations a parameter of the layers and token; from 02-21 on as everywhere here."""

OTHER_DAYS = [
    # 02-21 to 02-24, the first row of which is the others' base.
    _run("181B TP8 PP6 MBS4", A181, 48, (8, 6, 4), 2048, 120.85, 133.40, None),
    _run("181B TP8 PP6 MBS4, 02-21", A181, 48, (8, 6, 4), 2048, 121.48, 132.71, 56),
    _run("181B TP8 PP12 MBS4", A181, 48, (8, 12, 4), 2048, 123.79, 130.24, None),
    _run("181B TP8 PP6 MBS2", A181, 48, (8, 6, 2), 2048, 131.02, 123.05, 44),
    _run("196B TP8 PP12 MBS2", A196, 48, (8, 12, 2), 2048, 143.89, 121.45, 39),
    _run("196B TP8 PP12 MBS4", A196, 48, (8, 12, 4), 2048, 133.12, 131.27, 52),
    _run("196B TP8 PP6 MBS2", A196, 48, (8, 6, 2), 2048, 141.41, 123.58, None),
    _run("196B TP8 PP6 MBS4", A196, 48, (8, 6, 4), 2048, 130.31, 134.11, 56),
    _run("177B TP8 PP6 MBS2", A177, 48, (8, 6, 2), 2048, 136.73, 115.73, None),
    _run("177B TP8 PP6 MBS4", A177, 48, (8, 6, 4), 2048, 122.96, 128.69, None),
    _run("177B 128 heads", (12288, 96, 128), 48, (8, 6, 4), 2048, 129.42, 122.27, None),
    _run("182B TP8 PP6 MBS4", A182, 48, (8, 6, 4), 2048, 121.28, 133.93, None),
    _run("182B 96 heads", (13824, 78, 96), 48, (8, 6, 4), 2048, 124.75, 130.21, 59),
    _run("182B 128 heads", (13824, 78, 128), 48, (8, 6, 4), 2048, 162.72, 99.82, 54),
    _run("182B of 84 layers TP8 PP12 MBS4", A182_84, 48, (8, 12, 4), 2048, 125.52, 129.29, None),
    _run("182B of 84 layers TP8 PP6 MBS2", A182_84, 48, (8, 6, 2), 2048, 135.55, 119.72, None),
    _run("182B of 84 layers TP8 PP6 MBS4", A182_84, 48, (8, 6, 4), 2048, 122.93, 132.00, None),
    _run("182B of 84 layers 128 heads", (13312, 84, 128), 48, (8, 6, 4), 2048, 129.17, 125.63, None),
    _run("181B 16 heads", (14336, 72, 16), 48, (8, 6, 4), 2048, 121.03, 133.20, 54),
    _run("181B 32 heads", (14336, 72, 32), 48, (8, 6, 4), 2048, 124.01, 130.00, 55),
    _run("181B 64 heads", A181, 48, (8, 6, 4), 2048, 120.18, 134.15, 55),
    _run("181B 128 heads", (14336, 72, 128), 48, (8, 6, 4), 2048, 124.89, 129.08, 55),
    _run("181B 256 heads", (14336, 72, 256), 48, (8, 6, 4), 2048, 132.85, 121.35, 54),
    _run("181B 112 heads", (14336, 72, 112), 48, (8, 6, 4), 2048, 138.72, 116.21, 53),
    _run("177B 96 heads", (12288, 96, 96), 48, (8, 6, 4), 2048, 145.40, 108.83, None),
]

TOPOLOGIES = [
    # Of 02-20; three more rows do not say their layers.
    _run("194B TP8 PP6 DP8", A194, 48, (8, 6, 1), 2048, 183.64, 92.38, 39),
    _run("200B TP8 PP4 DP12", A200, 48, (8, 4, 1), 2040, 189.06, 91.67, 47),
    _run("200B TP8 PP5 DP9", A200, 45, (8, 5, 1), 2043, 208.40, 88.84, 44),
    _run("191B TP8 PP7 DP6", (14400, 77, 96), 42, (8, 7, 1), 2046, 202.99, 94.20, 39),
    _run("200B TP8 PP8 DP6", A200, 48, (8, 8, 1), 2046, 185.75, 93.59, 36),
    _run("200B TP8 PP10 DP4", A200, 40, (8, 10, 1), 2048, 221.21, 94.39, 35),
]

ZERO_STAGES = (
    # Stage 1's columns are exchanged in the log: 120.29 s and 134.02 TFLOP/s there, 134.02 s and 120.29 a table above,
    # which is what the formula says. Stage 0's TFLOP/s are those of its branch, by the older formula.
    _run("181B ZeRO-1", A181, 48, (8, 12, 2), 2048, 134.02, 120.29, 37),
    PublishedRun("181B ZeRO-0", *A181, 384, 8, 12, 2, 2048, 137.34, 113.02, 72, "deepspeed_fp16"),
)

ONE_NODE = [
    # 512 rows a step, as the table's head says; its column's 2,048 would be four times the TFLOP/s.
    _run("18B", (14336, 6, 32), 1, (8, 1, 2), 512, 119.19, 157.02, 54),
    _run("18B of 10 layers", (14336, 10, 32), 1, (8, 1, 1), 512, 205.52, 142.59, 80),
]
"""Nothing leaves the node: seconds can be compared with those of later days. The first row is there twice, with 130.43
s before."""

RAMP = PublishedRun("BLOOM, first 192 rows a step", 14336, 70, 112, 384, 4, 12, 1, 192, None, 73, None)
"""README.md: "GBS=192/MBS=1 @ 73 TFLOPs"."""
