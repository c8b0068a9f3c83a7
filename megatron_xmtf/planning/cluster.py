"""What a cluster can do: a named preset, a YAML file, and single keys on top.

    --cluster h100                                        a preset
    --cluster ours.yaml                                   base: h100
                                                          inter_node_gb_per_second: 100
    --cluster h100 cluster.memory_gib=64                  one key changed

Rates are what is reached, not what is printed on the box, except `peak_tflops`: `matmul_fraction` of it is reached in
large matrix products, beside what waves of tiles leave idle. Six constants of `jean-zay-a100-80` are calibrated, each
on one published row; `tests/planning/test_published_runs.py` solves them again and predicts the other rows:

    matmul_fraction      BLOOM, 2 rows a micro-batch        what most of its step is
    launch_ms_per_layer  the same, 4 rows                   half as many micro-batches
    ring_fraction        BLOOM's smallest batch, 16 rows    one micro-batch, then gradients and weights
    hop_ms               178B at TP8                        eight ranks in each sum instead of four
    unaligned_fraction   182B with 128 heads of 108         96 heads of 144 took 27 % less
    framework_gib        176B at TP8                        GiB beside what is counted

Source:  NVIDIA's data sheets (peaks, memory, NVLink); ml-engineering, "MAMF" (794.5 TFLOP/s of an H100's 989 in the
         best matrix products); bigscience tr11-176B-ml (Jean Zay: 8 A100 a node, 4 Omni-Path links of 100 Gb/s).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_xmtf.config.load import apply_override, config_from_mapping, load_yaml
from megatron_xmtf.config.section import PositiveInt, Section
from megatron_xmtf.errors import ConfigError, MissingError, nearest_names

__all__ = ["PRESETS", "Cluster", "load_cluster"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Cluster(Section):
    """GPUs, and what joins them."""

    name: str
    """As the plan calls it."""
    gpus_per_node: PositiveInt
    """GPUs that one node has; they are joined by NVLink."""
    multiprocessors: PositiveInt
    """Streaming multiprocessors of a GPU; matrix products run in waves of as many tiles."""
    memory_gib: Positive
    """Memory of a GPU that programs see."""
    peak_tflops: Positive
    """Dense TFLOP/s in bf16 and fp16, of the data sheet; what MFU is relative to."""
    fp32_tflops: Positive
    """Dense TFLOP/s in fp32, without TF32."""
    unaligned_fraction: Share = 0.536
    """Part of `fp32_tflops` that unfused attention reaches in half precision where rows of head_dim numbers do not
    begin at multiples of 16 bytes: no tensor core takes them. Default: as calibrated on Jean Zay's A100."""
    matmul_fraction: Share
    """Part of the peak that large matrix products reach."""
    attention_fraction: Share
    """Part of the peak that a fused attention kernel reaches, forward and backward."""
    memory_gb_per_second: Positive
    """GB/s (10^9) of the GPU's memory, of the data sheet."""
    memory_fraction: Share = 0.8
    """Part of it that elementwise kernels reach. 0.8: usual of streaming kernels."""
    intra_node_gb_per_second: Positive
    """GB/s a GPU sends in a collective within a node, each direction ("bus bandwidth")."""
    inter_node_gb_per_second: Positive
    """GB/s a whole node sends to others, each direction."""
    ring_fraction: Share = 1.0
    """Part of it that rings through several nodes reach, in which each node sends and receives at once."""
    link_gb_per_second: Positive
    """GB/s at most of it that one GPU can send."""
    launch_ms_per_layer: Annotated[float, Field(ge=0)]
    """Milliseconds that a micro-batch costs in each layer whatever its size, forward and backward together: launches
    and waits that no computation hides."""
    hop_ms: Annotated[float, Field(ge=0)]
    """Milliseconds of one hop of a ring within a node, whatever its bytes; a sum over t ranks takes 2 (t - 1)."""
    framework_gib: Annotated[float, Field(ge=0)]
    """GiB a GPU beside the tensors that are counted: CUDA context, NCCL's buffers, what the allocator cannot reuse."""
    storage_gb_per_second: Positive
    """GB/s that all ranks together write checkpoints with."""
    node_hours_between_failures: Positive
    """Hours that one node runs between two failures that stop a job, on average."""
    source: str = ""
    """Where the numbers come from."""


_A100: dict[str, Any] = {
    "gpus_per_node": 8,
    "multiprocessors": 108,
    "peak_tflops": 312.0,
    "fp32_tflops": 19.5,
    "attention_fraction": 0.5,  # FlashAttention-2 on an A100: 50 to 73 % (Dao 2023, section 4.1), less in short rows
    "intra_node_gb_per_second": 230.0,  # of NVLink 3's 300 each direction, NCCL's all-reduce
    "framework_gib": 9.4,
    "storage_gb_per_second": 20.0,
    # 1 to 2 GPU failures a week on 48 nodes of BLOOM's training (bigscience): 48 x 168 h / 1.5.
    "node_hours_between_failures": 5400.0,
}
NVLINK_HOP_MS = 0.0034
"""A ring's latency a hop over NVLink, protocol "simple" (NCCL, src/graph/tuning.cc, `hwLat`)."""
_HOPPER: dict[str, Any] = {
    "gpus_per_node": 8,
    "multiprocessors": 132,
    "peak_tflops": 989.0,
    "fp32_tflops": 67.0,
    # The clock falls under load. llm-foundry's 7B then comes out as much too fast on 8 H100 as on 8 A100, 12 %.
    "matmul_fraction": 0.62,
    "attention_fraction": 0.35,  # FlashAttention-2 on an H100 (Shah et al. 2024, abstract)
    "intra_node_gb_per_second": 360.0,  # of NVLink 4's 450
    "inter_node_gb_per_second": 400.0,  # eight NDR links of 50 GB/s
    "link_gb_per_second": 50.0,
    "launch_ms_per_layer": 0.6,
    "hop_ms": NVLINK_HOP_MS,
    "framework_gib": 9.4,
    "storage_gb_per_second": 20.0,
    "node_hours_between_failures": 5400.0,
}

PRESETS: dict[str, Cluster] = {
    preset.name: preset
    for preset in (
        Cluster(
            name="jean-zay-a100-80",
            memory_gib=79.2,
            memory_gb_per_second=2039.0,
            inter_node_gb_per_second=50.0,  # four Omni-Path links of 100 Gb/s
            link_gb_per_second=12.5,
            matmul_fraction=0.817,
            ring_fraction=0.442,
            # BLOOM ran with CUDA_LAUNCH_BLOCKING=1: no launch is hidden, and at each hop ranks wait for a host.
            hop_ms=0.0635,
            launch_ms_per_layer=5.07,
            **{**_A100, "storage_gb_per_second": 57.0},  # 2.3 TB in 40 s (bigscience chronicles)
            source="matmul_fraction, launch_ms_per_layer, ring_fraction, hop_ms calibrated on published step times of "
            "BLOOM with 2 and 4 rows a micro-batch, of its smallest batch and of 178B at TP8, unaligned_fraction on "
            "that of 182B with heads of 108; framework_gib on the memory of 176B at TP8",
        ),
        Cluster(
            name="a100-80",
            memory_gib=79.2,
            memory_gb_per_second=2039.0,
            inter_node_gb_per_second=200.0,  # eight HDR links of 25 GB/s, as DGX A100
            link_gb_per_second=25.0,
            matmul_fraction=0.817,
            launch_ms_per_layer=0.6,
            hop_ms=NVLINK_HOP_MS,
            **_A100,
            source="data sheets; matmul_fraction as calibrated on Jean Zay's A100",
        ),
        Cluster(
            name="a100-40",
            memory_gib=39.4,
            memory_gb_per_second=1555.0,
            inter_node_gb_per_second=200.0,
            link_gb_per_second=25.0,
            matmul_fraction=0.817,
            launch_ms_per_layer=0.6,
            hop_ms=NVLINK_HOP_MS,
            **_A100,
            source="data sheets; matmul_fraction as calibrated on Jean Zay's A100",
        ),
        Cluster(
            name="h100",
            memory_gib=79.1,
            memory_gb_per_second=3350.0,
            **_HOPPER,
            source="data sheets; matmul_fraction by llm-foundry's published tokens/s on H100 beside those on A100",
        ),
        Cluster(
            name="h200",
            memory_gib=139.8,
            memory_gb_per_second=4800.0,
            **_HOPPER,
            source="data sheets; matmul_fraction by llm-foundry's published tokens/s on H100 beside those on A100",
        ),
    )
}
"""Clusters by name."""


def load_cluster(name: Path | str, overrides: Iterable[str] = ()) -> Cluster:
    """Read a cluster: a preset's name or a YAML file, whose `base` names the preset that it changes.

    Args:    overrides: `key=value`, without the `cluster.` before them.
    Raises:  MissingError: neither. ConfigError: an unknown key, a wrong value, or a file without base that lacks keys.
    """
    path = Path(name)
    if str(name) in PRESETS:
        values: dict[str, Any] = PRESETS[str(name)].model_dump()
    elif path.suffix or path.exists():
        values = load_yaml(path)
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no cluster; a cluster is a mapping of keys, as `base: h100`.")
        base = values.pop("base", None)
        if base is not None:
            if base not in PRESETS:
                raise ConfigError(f"{path}: base={base!r} is no preset; {nearest_names(str(base), PRESETS)}.")
            values = {**PRESETS[base].model_dump(), "name": path.stem, **values}
    else:
        raise MissingError(
            f"cluster {str(name)!r} is neither a preset ({', '.join(PRESETS)}) nor a file; "
            f"{nearest_names(str(name), PRESETS)}."
        )
    for override in overrides:
        apply_override(values, override)
    return config_from_mapping(values, Cluster, source=f"cluster {name}")
