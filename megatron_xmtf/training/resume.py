"""Refuse to resume a run whose configuration changed in a way that changes the training; say what else changed."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigMismatchError

__all__ = ["changed_versions", "check_same_run", "warn_of_changed_versions"]

logger = logging.getLogger(__name__)

FREE_KEYS = (
    # These may change between two parts of a run; the curve goes on as if nothing had happened.
    "output",
    "model",
    "tokenizer",
    "parallel",
    "checkpoint",
    "evaluation",
    "logging",
    "stop",
    "watchdog",
    "slurm",
    "loss.non_finite",
    "loss.max_skipped_steps",
    "loss.spike_window",
    "loss.spike_deviations",
    "loss.spike_skip_steps",
    "kernels",
    "recompute",
    "batch.micro_batch_size",
    "optimizer.offload",
    "data.build_index",
    "data.guards.directory",
    "data.guards.workers",
    "data.index_directory",
    "data.validation",
)

FIXED_KEYS = ("batch.global_batch_size", "batch.rampup_batch_size")
"""Never let through: with the step they are the place in the data; rows would be read twice or not at all."""


def check_same_run(config: RunConfig, saved: Mapping[str, Any], *, allowed_changes: Sequence[str]) -> None:
    """Compare a run's configuration with the one in the checkpoint it resumes.

    Args:    saved: the resolved configuration kept in the manifest. allowed_changes: keys or sections let through.
    Raises:  ConfigMismatchError: every differing key with both values, and how to allow it.
    """
    now, before = _flat(config.model_dump(mode="json")), _flat(saved)
    for key in sorted(now.keys() | before.keys()):
        if key.startswith(FIXED_KEYS) and now.get(key) != before.get(key):
            raise ConfigMismatchError(
                f"{key} is {now.get(key)}, the resumed checkpoint's is {before.get(key)}: the place in the data would "
                "be lost. Put it back, or start a new run with model=CHECKPOINT and another output."
            )
    free = list(FREE_KEYS) + list(allowed_changes)
    if config.schedule.lr_decay_style in ("constant", "inverse_square_root"):
        # These rates do not know the end of the run: it may be made longer.
        free += ["schedule.train_steps", "schedule.train_rows"]
    if config.loss.normalization == "target_sequence_per_micro_batch":
        # This loss is another one with other micro-batches.
        free.remove("batch.micro_batch_size")
    differing = [
        key
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if differing:
        lines = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in differing)
        raise ConfigMismatchError(
            f"the configuration differs from the resumed checkpoint's: {lines}. Put it back, allow it with "
            f"`--allow-change {differing[0]}`, or start a new run in another output."
        )


def changed_versions(saved: Mapping[str, str]) -> list[str]:
    """Word what is installed in another version than a checkpoint was written with: "torch: 2.10.0 -> 2.13.0"."""
    changes = []
    for name, before in saved.items():
        try:
            now = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            now = "not installed"
        if now != before:
            changes.append(f"{name}: {before} -> {now}")
    return changes


def warn_of_changed_versions(saved: Mapping[str, str]) -> None:
    """Say that a run goes on with other libraries: its curve may differ in the last digits, or in more.

    It is no error: a cluster is upgraded in the middle of long runs, and the checkpoint says what wrote each part.
    """
    changes = changed_versions(saved)
    if changes:
        logger.warning("the resumed checkpoint was written with other versions: %s", "; ".join(changes))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to dotted keys: {"a": {"b": [1]}} -> {"a.b.0": 1}."""
    items: list[tuple[str, Any]]
    if isinstance(values, Mapping):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(str(number), value) for number, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return flat
