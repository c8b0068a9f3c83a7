"""What ranks send in a step, by kind, in bytes and seconds.

    tensor      each layer sums its hidden states over the tensor-parallel ranks: twice forward, twice backward, twice
                more when it is recomputed; a ring sends 2 (t - 1) / t of each tensor. Sequence parallelism makes halves
                of each sum, the same bytes
    pipeline    each stage sends hidden states on and their gradients back, once a micro-batch and chunk
    data        gradients summed: reduce-scatter (d - 1) / d of them, all-reduce twice that; weights gathered where the
                optimizer is sharded, (d - 1) / d
    embedding   the first and the last stage sum the gradients of a tied embedding

Ranks are numbered by tensor, then data, then pipeline (Megatron-Core, DeepSpeed): a tensor-parallel group is within a
node while it is no larger than one; t x d ranks of one stage are neighbours, and where they fill a node, all of it
sends to the next stage at once.

Source:  Narayanan et al. 2021, sections 3.2 and 3.3; NCCL's ring algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layer_work import LayerWork
from megatron_xmtf.planning.layout import Layout

__all__ = ["Traffic", "data_traffic", "embedding_traffic", "pipeline_traffic", "tensor_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, and the seconds that it takes."""

    gigabytes: float
    seconds: float


def tensor_traffic(layout: Layout, cluster: Cluster, *, reduced_bytes: float) -> Traffic:
    """Return the traffic of summing tensors of some bytes over the tensor-parallel ranks."""
    if layout.tp == 1:
        return Traffic(0.0, 0.0)
    sent = 2 * (layout.tp - 1) / layout.tp * reduced_bytes
    rate = cluster.intra_node_gb_per_second
    if layout.tp > cluster.gpus_per_node:
        rate = cluster.inter_node_gb_per_second / cluster.gpus_per_node
    return Traffic(sent / 1e9, sent / 1e9 / rate)


def reduced_bytes(work: LayerWork, layout: Layout) -> tuple[float, float]:
    """Return the bytes that a layer sums over the ranks of one micro-batch: (forward, backward with recomputation)."""
    again = work.reduced_forward if layout.recompute.granularity == "full" else 0.0
    return work.reduced_forward, work.reduced_backward + again


def pipeline_traffic(architecture: Architecture, layout: Layout, cluster: Cluster) -> Traffic:
    """Return the traffic of one hand-over: a micro-batch's hidden states of one chunk, in one direction."""
    if layout.pp == 1:
        return Traffic(0.0, 0.0)
    tokens = layout.micro_batch_size * sum(layout.sides)
    split = layout.tp if layout.parallel.sequence_parallel or layout.engine.splits_pipeline else 1
    sent = tokens * architecture.hidden_size * layout.number_bytes / split / 1e9
    if layout.gpus <= cluster.gpus_per_node:
        return Traffic(sent, sent / cluster.intra_node_gb_per_second)
    together = min(cluster.gpus_per_node, layout.tp * layout.dp)
    return Traffic(sent, sent / min(cluster.link_gb_per_second, cluster.inter_node_gb_per_second / together))


def data_traffic(layout: Layout, cluster: Cluster, *, parameters: int) -> Traffic:
    """Return the traffic of summing one rank's gradients and gathering its weights."""
    d, engine = layout.dp, layout.engine
    if d == 1:
        return Traffic(0.0, 0.0)
    sharded = layout.shards_optimizer
    times = 2 if engine.reduces_all or not sharded else 1
    gathered = layout.number_bytes if sharded else 0
    sent = (d - 1) / d * parameters * (times * engine.sent_bytes + gathered) / 1e9
    return Traffic(sent, sent / _rate(layout, cluster, ranks=layout.tp * d))


def embedding_traffic(architecture: Architecture, layout: Layout, cluster: Cluster) -> Traffic:
    """Return the traffic of summing a tied embedding's gradients over the first and the last stage."""
    tied = isinstance(architecture, BloomArchitecture) or architecture.tied_head
    if layout.pp == 1 or not tied:
        return Traffic(0.0, 0.0)
    numbers = architecture.padded_vocab_size * architecture.hidden_size / layout.tp
    sent = numbers * layout.engine.sent_bytes / 1e9
    return Traffic(sent, sent / _rate(layout, cluster, ranks=layout.gpus))


def _rate(layout: Layout, cluster: Cluster, *, ranks: int) -> float:
    """Return GB/s a rank: NVLink while all that send at once are in one node, else its share of the node's links."""
    if ranks <= cluster.gpus_per_node or layout.gpus <= cluster.gpus_per_node:
        return cluster.intra_node_gb_per_second
    share = cluster.inter_node_gb_per_second / cluster.gpus_per_node
    return min(cluster.link_gb_per_second, share)
