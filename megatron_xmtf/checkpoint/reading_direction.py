"""Whether a checkpoint's model reads inputs in both directions, as `batch.prefix_lm` trained it."""

from __future__ import annotations

from pathlib import Path

from megatron_xmtf.checkpoint.manifest import CheckpointManifest
from megatron_xmtf.files import read_json

__all__ = ["attends_prefix"]


def attends_prefix(directory: Path, manifest: CheckpointManifest) -> bool:
    """Tell whether inputs are seen by all of their example, also by what stands before them.

    A training run's checkpoint says so in its configuration; one without, of an import, in the config.json that
    `xmtf export --allow-causal` marked.
    """
    if manifest.config is not None:
        return bool(manifest.config.get("batch", {}).get("prefix_lm", False))
    config = directory / "hf" / "config.json"
    return config.is_file() and bool(read_json(config).get("prefix_lm", False))
