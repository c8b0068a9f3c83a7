"""The guards of a run: its datasets against one another and against the tasks it is evaluated on.

    data.guards          evaluation.tasks     xmtf plan                  xmtf pack, xmtf train
    contamination: off                        not looked for             not looked for
    contamination: report   tasks.yaml        scanned, counted           not looked for: nothing would change
    contamination: drop     tasks.yaml        scanned, counted           scanned; such examples are in no row
    contamination: report   none              not checked, and said so

A scan is kept in OUT/guards under the hash of all that changes it: the plan's is the one that packing opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from megatron_xmtf.checkpoint.model_tokenizer import load_model_tokenizer
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import EvaluationText, GuardFlags, GuardSettings, open_flags, scan
from megatron_xmtf.data.objectives import StoredDatasets
from megatron_xmtf.data.selection import selected_by_mixture
from megatron_xmtf.evaluation.tasks import load_tasks

__all__ = ["drop_flagged", "evaluation_texts", "report_guards"]


def report_guards(config: RunConfig, datasets: Sequence[ExampleDataset], *, build: bool = True) -> GuardFlags | None:
    """Look for everything that the guards are to find; None when all are off.

    Args:    datasets: those of `data.training_datasets`, in that order. build: scan if that was not done before;
             False: a missing result is an error.
    Raises:  as `scan`, `open_flags` and `load_tasks`; TokenizerError: the model's tokenizer cannot be read.
    """
    guards, settings = config.data.guards, _settings(config)
    if guards.duplicates == guards.near_duplicates == guards.contamination == "off":
        return None
    # Documents are looked at as they are stored, once, however many objectives make examples of them.
    behind = StoredDatasets(datasets)
    selected = selected_by_mixture(datasets, config.data.training_mixture, split_seed=config.data.split_seed)
    flags = (partial(scan, workers=guards.workers) if build else open_flags)(
        behind.stored,
        tokenizer=load_model_tokenizer(config.tokenizer_source),
        evaluation_texts=evaluation_texts(config.evaluation.tasks) if guards.contamination != "off" else [],
        settings=settings,
        directory=guards.directory or Path(config.output) / "guards",
        selected=behind.selected(selected),
    )
    return replace(flags, flags=behind.spread(flags.flags))


def drop_flagged(config: RunConfig, datasets: Sequence[ExampleDataset], *, build: bool = True) -> GuardFlags | None:
    """Find what is to be left out of the rows; None, without a look at the data, when nothing is.

    Raises:  as `report_guards`.
    """
    return report_guards(config, datasets, build=build) if _settings(config).dropped() else None


def evaluation_texts(task_files: Sequence[str]) -> list[EvaluationText]:
    """Read the questions and answers of task files.

    Raises:  as `load_tasks`.
    """
    return [
        EvaluationText(
            task=task.settings.name,
            language=example.language,
            inputs=example.inputs,
            targets=example.target,
            template=example.template,
        )
        for task in (load_tasks(task_files) if task_files else [])
        for example in task.examples
    ]


def _settings(config: RunConfig) -> GuardSettings:
    values = config.data.guards
    return GuardSettings(**{field.name: getattr(values, field.name) for field in fields(GuardSettings)})
