"""What ranks send in a step, by kind, in bytes and seconds.

    tensor      each layer sums its hidden states over the tensor-parallel ranks: twice forward, twice backward, twice
                more when it is recomputed; a ring sends 2 (t - 1) / t of each tensor in 2 (t - 1) hops. Sequence
                parallelism makes halves of each sum, the same bytes and hops, and gathers what came in once more
                backward. What products hide of the backward pass's: `chunk_time._backward_sums`
    pipeline    each stage sends hidden states on and their gradients back, once a micro-batch and chunk, at each of its
                borders: both directions at once (Megatron-Core), or one after the other (DeepSpeed)
    data        gradients summed: reduce-scatter (d - 1) / d of them, all-reduce twice that; weights gathered where the
                optimizer is sharded, (d - 1) / d. A stage's t rings run through the same nodes and share links
    embedding   the first and the last stage sum the gradients of a tied embedding

Ranks are numbered by tensor, then data, then pipeline (Megatron-Core, DeepSpeed): a tensor-parallel group is within a
node while it is no larger than one; t x d ranks of one stage are neighbours, and where they fill a node, all of it
sends to the next stage at once; where they do not, some borders of stages are within a node.

Source:  Narayanan et al. 2021, sections 3.2 and 3.3; NCCL's ring algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layout import Layout

__all__ = ["Traffic", "data_traffic", "embedding_traffic", "pipeline_traffic", "tensor_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, and the seconds that it takes."""

    gigabytes: float
    seconds: float


def tensor_traffic(layout: Layout, cluster: Cluster, *, reduced_bytes: float, sums: int) -> Traffic:
    """Return the traffic of summing `sums` tensors, together of some bytes, over the tensor-parallel ranks."""
    if layout.tp == 1:
        return Traffic(0.0, 0.0)
    sent = 2 * (layout.tp - 1) / layout.tp * reduced_bytes
    rate = cluster.intra_node_gb_per_second
    if layout.tp > cluster.gpus_per_node:
        rate = cluster.inter_node_gb_per_second / cluster.gpus_per_node
    waits = sums * 2 * (layout.tp - 1) * cluster.hop_ms / 1e3
    return Traffic(sent / 1e9, sent / 1e9 / rate + waits)


def pipeline_traffic(architecture: Architecture, layout: Layout, cluster: Cluster, *, border: int | None) -> Traffic:
    """Return the traffic of one hand-over: a micro-batch's hidden states of one chunk, in one direction.

    Args:    border: between stages `border` and `border + 1`; None: from the last back to the first.
    """
    if layout.pp == 1:
        return Traffic(0.0, 0.0)
    tokens = layout.micro_batch_size * sum(layout.sides)
    split = layout.tp if layout.parallel.sequence_parallel or layout.engine.splits_pipeline else 1
    sent = tokens * architecture.hidden_size * layout.number_bytes / split / 1e9
    ranks, node = layout.tp * layout.dp, cluster.gpus_per_node
    in_node = border is not None and border * ranks // node == ((border + 2) * ranks - 1) // node
    if in_node or layout.gpus <= node:
        return Traffic(sent, sent / cluster.intra_node_gb_per_second)
    together = min(node, ranks)
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
    return Traffic(sent, sent / _ring_rate(layout, cluster))


def embedding_traffic(architecture: Architecture, layout: Layout, cluster: Cluster) -> Traffic:
    """Return the traffic of summing a tied embedding's gradients over the first and the last stage."""
    tied = isinstance(architecture, BloomArchitecture) or architecture.tied_head
    if layout.pp == 1 or not tied:
        return Traffic(0.0, 0.0)
    numbers = architecture.padded_vocab_size * architecture.hidden_size / layout.tp
    sent = numbers * layout.engine.sent_bytes / 1e9
    return Traffic(sent, sent / _pair_rate(layout, cluster))


def _ring_rate(layout: Layout, cluster: Cluster) -> float:
    """Return GB/s a rank of the data-parallel rings: NVLink in one node, else a ring's share of the node's links.

    The tp rings of a stage go through the same nodes; each leaves a node once, whatever number of its ranks is there.
    """
    if layout.tp * layout.dp <= cluster.gpus_per_node or layout.gpus <= cluster.gpus_per_node:
        return cluster.intra_node_gb_per_second
    rate = cluster.inter_node_gb_per_second * cluster.ring_fraction
    return rate / min(layout.tp, cluster.gpus_per_node)


def _pair_rate(layout: Layout, cluster: Cluster) -> float:
    """Return GB/s a rank where each of a node's sends to one in another node."""
    if layout.gpus <= cluster.gpus_per_node:
        return cluster.intra_node_gb_per_second
    return min(cluster.link_gb_per_second, cluster.inter_node_gb_per_second / cluster.gpus_per_node)
