"""Training loss by dataset and language, as means over the steps since the last report.

    micro-batch of one row    segment 1: squad, en     segment 2: xnli, sw      weights of `target_sequence`
    losses * loss_weights     0.6 + 0.4                1.0 + 2.0
    loss_weights              1/2 + 1/2                1/2 + 1/2
    sums, weights             squad/en 1.0, 1          xnli/sw 3.0, 1           -> train_loss/squad/en 1.0, .../sw 3.0

The mean of a group is sum(losses * loss_weights) / sum(loss_weights) over its targets: what the run's own normalisation
says, within the group. Invariant: the means, weighted by the groups' weights, add up to the mean loss of those steps
(for normalisations that divide over the global batch).

Losses are known on the last pipeline stage alone. It keeps them as they are, without waiting for the device; they are
read and summed in float64 on the CPU once a step, so that the sums do not depend on the order of GPU threads. Only the
vectors of sums, two numbers a group, cross ranks, and only when they are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.rows import Row
from megatron_xmtf.models.forward import MicroBatch

__all__ = ["BadExample", "GroupLosses"]


class BadExample(NamedTuple):
    """An example as a person finds it again."""

    dataset: str
    language: str
    example: int

    @classmethod
    def of(cls, dataset: ExampleDataset, example: int) -> BadExample:
        """Name an example of a dataset."""
        column = dataset.column("language")
        return cls(dataset.name, "" if column is None else dataset.names("language")[column[example]], example)


class GroupLosses:
    """Sums of one rank since the last report; a resumed run starts them anew.

    Args:  datasets: those that the rows' `dataset_ids` count.
    """

    def __init__(self, datasets: Sequence[ExampleDataset]) -> None:
        self.datasets = list(datasets)
        self._languages = [dataset.names("language") or [""] for dataset in self.datasets]
        self._columns = [dataset.column("language") for dataset in self.datasets]
        # Group of (dataset d, language l): first[d] + l.
        self._first = np.concatenate([[0], np.cumsum([len(names) for names in self._languages])])
        self._sums = np.zeros((self.num_groups, 2))
        self._pending: list[tuple[MicroBatch, Tensor]] = []

    @property
    def num_groups(self) -> int:
        """Pairs of dataset and language."""
        return int(self._first[-1])

    def add(self, batch: MicroBatch, losses: Tensor) -> None:
        """Keep the losses of a micro-batch; called where they are, without waiting for the device.

        Args:    losses: fp32 [micro_batch, sequence], cross-entropy of every position.
        """
        self._pending.append((batch, losses.detach().float()))

    def finish_step(self) -> None:
        """Sum what was kept in this step; waits for the device."""
        for batch, losses in self._pending:
            weights = batch.loss_weights.cpu().double().numpy()
            groups = self._groups(batch)
            has_weight = weights > 0
            weighted = losses.cpu().double().numpy() * weights
            for column, values in enumerate((weighted, weights)):
                self._sums[:, column] += np.bincount(groups[has_weight], values[has_weight], minlength=self.num_groups)
        self._pending.clear()

    def drop_step(self) -> list[BadExample]:
        """Forget what was kept in this step, and name the examples whose own losses are not finite."""
        found: set[BadExample] = set()
        for batch, losses in self._pending:
            rows: Sequence[Row | EncoderDecoderRow] = batch.rows
            is_bad = ~torch.isfinite(losses).cpu().numpy()
            segments = batch.segment_ids.cpu().numpy()
            for number, row in enumerate(rows):
                for segment in np.unique(segments[number][is_bad[number]]):
                    if segment:
                        dataset = self.datasets[row.dataset_ids[segment - 1]]
                        found.add(BadExample.of(dataset, int(row.example_ids[segment - 1])))
        self._pending.clear()
        return sorted(found)

    def report(self, device: torch.device) -> dict[str, float]:
        """Return the means since the last report, the same on every rank, and start anew; a collective call.

        Returns: `train_loss/<dataset>`, `train_loss/<dataset>/<language>`, and over all datasets
                 `train_loss_by_language/<language>`; of groups that had a target alone.
        """
        sums = torch.from_numpy(self._sums).to(device)
        # Ranks of the last stage that share its layers have the same losses; over data-parallel ranks they add up.
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                sums,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        self._sums = np.zeros((self.num_groups, 2))
        return self._means(sums.cpu().numpy())

    def _groups(self, batch: MicroBatch) -> NDArray[np.int64]:
        """Return the group of every position, [micro_batch, sequence]; positions of padding get group 0."""
        segments = batch.segment_ids.cpu().numpy()
        rows: Sequence[Row | EncoderDecoderRow] = batch.rows
        found = np.zeros(segments.shape, np.int64)
        for number, row in enumerate(rows):
            of_segment = np.zeros(len(row.example_ids) + 1, np.int64)
            of_segment[1:] = self._first[row.dataset_ids]
            for segment, (dataset, example) in enumerate(zip(row.dataset_ids, row.example_ids, strict=True), start=1):
                column = self._columns[dataset]
                if column is not None:
                    of_segment[segment] += column[example]
            found[number] = of_segment[segments[number]]
        return found

    def _means(self, sums: NDArray[np.float64]) -> dict[str, float]:
        means: dict[str, float] = {}
        by_language: dict[str, NDArray[np.float64]] = {}
        for dataset, languages, first in zip(self.datasets, self._languages, self._first, strict=False):
            own = sums[first : first + len(languages)]
            if own[:, 1].any():
                means[f"train_loss/{dataset.name}"] = float(own[:, 0].sum() / own[:, 1].sum())
            for language, pair in zip(languages, own, strict=True):
                if language and pair[1]:
                    means[f"train_loss/{dataset.name}/{language}"] = float(pair[0] / pair[1])
                    by_language[language] = by_language.get(language, np.zeros(2)) + pair
        for language, pair in sorted(by_language.items()):
            means[f"train_loss_by_language/{language}"] = float(pair[0] / pair[1])
        return means
