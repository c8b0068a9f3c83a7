"""Validation loss by dataset and language: the mean over targets of their mean token loss, at any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.loader import AnyRows, validation_batches
from megatron_xmtf.data.rows import Row
from megatron_xmtf.models.forward import MicroBatch, run_forward

__all__ = ["ValidationSet", "validation_batches_by_name", "validation_losses"]

ValidationSet = tuple[ExampleDataset, list[MicroBatch]]
"""A dataset and all batches of its rows that are measured."""


def validation_batches_by_name(
    config: RunConfig, rows_by_name: Mapping[str, tuple[ExampleDataset, AnyRows]]
) -> dict[str, ValidationSet]:
    """Read the rows of every validation set; `run_forward` deals their batches to the data-parallel ranks."""
    return {
        name: (
            dataset,
            validation_batches(
                rows,
                num_rows=config.evaluation.rows,
                micro_batch_size=config.batch.micro_batch_size,
                data_parallel_rank=0,
                data_parallel_size=1,
                normalization="target_sequence",
                prefix_lm=config.batch.prefix_lm,
            ),
        )
        for name, (dataset, rows) in rows_by_name.items()
    }


def validation_losses(
    chunks: Sequence[torch.nn.Module], datasets: Mapping[str, tuple[ExampleDataset, Sequence[MicroBatch]]]
) -> dict[str, float]:
    """Return `loss/<dataset>/<language>` for every language of every dataset, and `loss/<dataset>` over all.

    Args:    datasets: name -> (dataset, batches of the whole validation set, the same on every rank), the batches
             weighted by `target_sequence`.
    """
    losses: dict[str, float] = {}
    for name, (dataset, batches) in datasets.items():
        languages = dataset.column("language")
        names = dataset.names("language") if languages is not None else []
        by_language: dict[str, list[float]] = defaultdict(list)
        for result in run_forward(chunks, list(batches), _target_losses):
            for example, loss in result:
                language = names[languages[example]] if languages is not None else ""
                by_language[language].append(loss)
        everything = [loss for values in by_language.values() for loss in values]
        losses[f"loss/{name}"] = sum(everything) / max(1, len(everything))
        for language, values in sorted(by_language.items()):
            if language:
                losses[f"loss/{name}/{language}"] = sum(values) / len(values)
    return losses


def _target_losses(batch: MicroBatch, losses: Tensor) -> list[tuple[int, float]]:
    """Return (example id, mean loss of its target tokens in nats) of every segment with a target.

    Args:    losses: fp32 [micro_batch, sequence]; the weights of `target_sequence` sum to 1 in each segment.
    """
    weighted = (losses.double() * batch.loss_weights).cpu()
    segments = batch.segment_ids.cpu()
    has_weight = (batch.loss_weights > 0).cpu()
    found = []
    rows: Sequence[Row | EncoderDecoderRow] = batch.rows
    for number, row in enumerate(rows):
        size = len(row.example_ids) + 1
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, segments[number], weighted[number])
        counts = torch.bincount(segments[number][has_weight[number]], minlength=size)
        found += [
            (int(example), float(sums[segment]))
            for segment, example in enumerate(row.example_ids, start=1)
            if counts[segment]
        ]
    return found
