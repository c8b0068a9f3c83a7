"""Compare parameters that several ranks hold, bit by bit, and name the one that has drifted.

    held by                                     which
    data-parallel ranks                         every parameter
    tensor-parallel ranks                       what is not split over them: norms, biases of row-parallel layers
    first and last pipeline stage               the embedding and the output layer tied to it
    all pipeline stages                         an encoder-decoder's tables of relative positions

Copies start equal and get equal updates; where they differ, a reduction was left out or a machine computes wrongly, and
training goes on without an error. What is exchanged is a digest of 16 bytes a parameter. The bits are read as integers
(words of 8 bytes, w_0 w_1 ...) whose arithmetic modulo 2^64 is exact in any order:

    digest = (sum of w_i, sum of (2 i + 1) w_i)

A single word that differs always changes the first sum. Several that cancel there and in the second are missed with a
probability of about 2^-64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.errors import ReplicaDriftError

__all__ = ["check_replicas", "tensor_digest"]

WORDS_AT_ONCE = 1 << 22
"""Words of one partial sum: 32 MiB of parameters, with a product of the same size in memory."""


@dataclass(frozen=True)
class _ReplicaGroup:
    """Ranks that hold the same parameters, and which ones of this rank's those are."""

    held_by: str
    group: Any
    parameters: list[tuple[str, Tensor]]


def check_replicas(chunks: Sequence[torch.nn.Module]) -> None:
    """Compare all replicated parameters over their ranks; a collective call of all ranks.

    Args:    chunks: of this rank, with every parameter gathered.
    Raises:  ReplicaDriftError: on all ranks together; names tensor, ranks and values.
    """
    # Every rank takes part in every comparison before any raises, so that none waits for one that is gone.
    drifts = [drift for group in _replica_groups(chunks) for drift in _drifts(group)]
    reported: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    device = next(chunks[0].parameters()).device
    count = torch.tensor(len(drifts), device=device)
    torch.distributed.all_reduce(count)
    if not int(count):
        return
    torch.distributed.all_gather_object(reported, drifts)
    found = list(dict.fromkeys(drift for drifts in reported for drift in drifts))
    more = f" ({len(found)} differ; the first 5 are named)" if len(found) > 5 else ""
    raise ReplicaDriftError(
        f"copies of a parameter have drifted apart{more}: {'; '.join(found[:5])}. All ranks must hold the same bits. "
        "No checkpoint is written from here on; resume from the last one, and if it happens again, look at the machine "
        "of the rank that is off, or switch the check off with logging.replica_check_interval=null."
    )


def tensor_digest(tensor: Tensor) -> Tensor:
    """Return two numbers that tell whether tensors are equal bit by bit.

    Args:    tensor: of any dtype, contiguous.
    Returns: int64 [2] on the tensor's device; see the module's docstring.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # words of 8 bytes begin at multiples of 8
    whole = octets.numel() // 8 * 8
    words = octets[:whole].view(torch.int64)
    if whole < octets.numel():
        last = torch.zeros(8, dtype=torch.uint8, device=tensor.device)
        last[: octets.numel() - whole] = octets[whole:]
        words = torch.cat([words, last.view(torch.int64)])
    odd = 2 * torch.arange(min(WORDS_AT_ONCE, words.numel()), device=tensor.device) + 1
    digest = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for begin in range(0, words.numel(), WORDS_AT_ONCE):
        part = words[begin : begin + WORDS_AT_ONCE]
        total = part.sum()
        digest[0] += total
        # (2 (begin + i) + 1) w_i = (2 i + 1) w_i + 2 begin w_i
        digest[1] += (part * odd[: part.numel()]).sum() + 2 * begin * total
    return digest


def _replica_groups(chunks: Sequence[torch.nn.Module]) -> list[_ReplicaGroup]:
    parameters = _named_parameters(chunks)
    groups = [_ReplicaGroup("data-parallel ranks", parallel_state.get_data_parallel_group(), parameters)]
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        whole = [
            (name, parameter)
            for name, parameter in parameters
            if not getattr(parameter, "tensor_model_parallel", False)  # an attribute that Megatron-Core sets
        ]
        groups.append(_ReplicaGroup("tensor-parallel ranks", parallel_state.get_tensor_model_parallel_group(), whole))
    if (
        parallel_state.get_pipeline_model_parallel_world_size() > 1
        and parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
        and (tied := _tied_embedding(chunks)) is not None
    ):
        groups.append(_ReplicaGroup("pipeline stages", parallel_state.get_embedding_group(), [tied]))
    on_all_stages = [
        (name, parameter)
        for name, parameter in parameters
        if getattr(parameter, "pipeline_parallel", False)  # an attribute that Megatron-Core reads
    ]
    groups.append(_ReplicaGroup("pipeline stages", parallel_state.get_pipeline_model_parallel_group(), on_all_stages))
    return groups


def _tied_embedding(chunks: Sequence[torch.nn.Module]) -> tuple[str, Tensor] | None:
    """Return this rank's copy of the embedding that the first and the last stage share; None for an untied model."""
    for chunk in unwrap_model(list(chunks)):
        if chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process):
            return "embedding.word_embeddings.weight", chunk.shared_embedding_or_output_weight()
    return None


def _named_parameters(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, Tensor]]:
    """Return every parameter of this rank under the name that checkpoints use, which counts layers over all stages."""
    found = []
    for chunk in unwrap_model(list(chunks)):
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        key_of = {id(entry.data): entry.key for entry in state.values() if isinstance(entry, ShardedTensor)}
        found += [(key_of.get(id(parameter), name), parameter) for name, parameter in chunk.named_parameters()]
    return found


def _drifts(replicas: _ReplicaGroup) -> list[str]:
    """Compare the parameters of a group and describe those that differ; every rank of the group calls it."""
    if replicas.group.size() == 1 or not replicas.parameters:
        return []
    own = torch.stack([tensor_digest(parameter) for _, parameter in replicas.parameters])
    digests = [torch.empty_like(own) for _ in range(replicas.group.size())]
    torch.distributed.all_gather(digests, own, group=replicas.group)
    differs = (torch.stack(digests) != digests[0]).any(dim=2).any(dim=0)  # [parameters]
    return [_describe(*replicas.parameters[place], replicas=replicas) for place in differs.nonzero().flatten().tolist()]


def _describe(name: str, parameter: Tensor, *, replicas: _ReplicaGroup) -> str:
    """Word one drifted parameter: its largest difference from the copy of the group's first rank.

    decoder.final_layernorm.weight over tensor-parallel ranks: rank 1 differs from rank 0 in 3 of 64 values,
    most at [17]: 1.0009765625, not 1.0
    """
    ranks = torch.distributed.get_process_group_ranks(replicas.group)
    first = parameter.detach().clone()
    torch.distributed.broadcast(first, src=ranks[0], group=replicas.group)
    ours, theirs = parameter.detach().reshape(-1), first.reshape(-1)
    # Bits are compared, for NaN equals nothing and -0.0 equals 0.0.
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    unequal = ours.view(integer) != theirs.view(integer)
    sizes = torch.where(unequal, (ours.double() - theirs.double()).abs().nan_to_num(torch.inf), -1.0)
    place = int(sizes.argmax())
    words = [""] * replicas.group.size()
    if bool(unequal.any()):
        index = [int(i) for i in torch.unravel_index(torch.tensor(place), parameter.shape)]
        mine = (
            f"rank {torch.distributed.get_rank()} differs from rank {ranks[0]} in {int(unequal.sum())} of "
            f"{ours.numel()} values, most at {index}: {float(ours[place])!r}, not {float(theirs[place])!r}"
        )
    else:
        mine = ""
    torch.distributed.all_gather_object(words, mine, group=replicas.group)
    return f"{name} over {replicas.held_by}: " + ", ".join(word for word in words if word)
