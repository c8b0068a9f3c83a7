"""Run batches through the pipeline: the one forward step of training and evaluation, and forward-only runs.

Every rank reads its own rows (they are memory-mapped), so no batch is broadcast; every stage gets `segment_ids`,
which its attention needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.data.batch import Batch
from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch

__all__ = ["MicroBatch", "chunk_iterators", "device_of", "forward_chunk", "run_forward", "run_logits"]

MicroBatch = Batch | EncoderDecoderBatch
"""What a model of any family reads."""


def device_of(chunks: Sequence[torch.nn.Module]) -> torch.device:
    """Return the device that the model computes on."""
    return next(chunks[0].parameters()).device


def forward_chunk(
    batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, with_labels: bool = True
) -> tuple[Tensor, MicroBatch]:
    """Draw the next micro-batch and run it through one chunk; losses are computed where the batch has one.

    Returns: the chunk's output (losses, logits or hidden states, see the model's `forward`) and the batch it read.
    """
    batch = next(batches).to(next(chunk.parameters()).device)
    return chunk(**batch.model_inputs(with_labels=with_labels)), batch


def chunk_iterators(batches: Sequence[MicroBatch], chunks: Sequence[torch.nn.Module]) -> list[Iterator[MicroBatch]]:
    """Give each chunk its own pass over the same micro-batches."""
    return [iter(batches) for _ in chunks]


def run_forward(
    chunks: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], reduce: Callable[[MicroBatch, Tensor], Any]
) -> list[Any]:
    """Compute the loss of every target token, without gradients, and return `reduce` of each batch on every rank.

    Batches are dealt to the data-parallel ranks; results come back in the order of `batches`.

    Args:    chunks: of `build_model`. batches: all of one shape [micro_batch, sequence], the same on every rank.
             reduce: called on the last pipeline stage with the batch and its fp32 losses [micro_batch, sequence],
             0 where `loss_weights` is 0; what it returns is pickled to the other ranks.
    """
    return _run(chunks, batches, reduce, with_labels=True)


def run_logits(
    chunks: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], reduce: Callable[[MicroBatch, Tensor], Any]
) -> list[Any]:
    """Compute logits, without gradients, and return `reduce` of each batch on every rank.

    Args:    as `run_forward`; `reduce` gets fp32 logits [micro_batch, sequence, vocab_size], gathered over the
             tensor-parallel ranks and without the padded words.
    """

    def gather_and_reduce(batch: MicroBatch, logits: Tensor) -> Any:
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=group)
        vocab_size = unwrap_model(chunks[-1]).architecture.vocab_size
        return reduce(batch, torch.cat(parts, dim=-1)[..., :vocab_size].float())

    return _run(chunks, batches, gather_and_reduce, with_labels=False)


def _run(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    reduce: Callable[[MicroBatch, Tensor], Any],
    *,
    with_labels: bool,
) -> list[Any]:
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = list(batches[dp_rank::dp_size])
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            results = _run_pipeline(chunks, own, reduce, with_labels=with_labels) if own else []
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)
    gathered: list[Any] = [None] * dp_size
    torch.distributed.all_gather_object(gathered, results, group=parallel_state.get_data_parallel_group_gloo())
    return [gathered[i % dp_size][i // dp_size] for i in range(len(batches))]


def _run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    reduce: Callable[[MicroBatch, Tensor], Any],
    *,
    with_labels: bool,
) -> list[Any]:
    """Run this data-parallel rank's batches and hand the last stage's results to all of its stages."""
    shapes = {(len(batch.segment_ids), batch.pipeline_length) for batch in batches}
    assert len(shapes) == 1, f"batches of one run must have one shape, not {sorted(shapes)}"
    micro_batch_size, pipeline_length = shapes.pop()

    def step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        output, batch = forward_chunk(iterator, chunk, with_labels=with_labels)
        return output, partial(_reduced, reduce, batch)

    # The interleaved schedule wants a multiple of the stages: the last batch is run again, and its results are dropped.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    filled = [*batches, *batches[-1:] * (-len(batches) % stages)] if len(chunks) > 1 else list(batches)
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=chunk_iterators(filled, chunks) if len(chunks) > 1 else iter(filled),
        model=list(chunks),
        num_microbatches=len(filled),
        seq_length=pipeline_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    holder = [results[: len(batches)] if parallel_state.is_pipeline_last_stage() else None]
    if stages > 1:
        torch.distributed.broadcast_object_list(
            holder,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    assert holder[0] is not None, "the last stage has the results"
    return list(holder[0])


def _reduced(
    reduce: Callable[[MicroBatch, Tensor], Any], batch: MicroBatch, output: Tensor, *, non_loss_data: bool
) -> Any:
    """Adapt `reduce` to what Megatron-Core's schedules call on the last stage."""
    assert non_loss_data, "forward-only runs collect data, not losses"
    return reduce(batch, output)
