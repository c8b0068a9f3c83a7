"""Whether a run's data lies on this machine, without opening any of it: the hardware can be planned without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_xmtf.config.schema import RunConfig

__all__ = ["why_no_data"]


def why_no_data(config: RunConfig, missing: Sequence[str]) -> str:
    """Say why the data cannot be planned; empty where it can.

    Args:    missing: keys that a run needs and nobody gave (`run_model.load_plan_config`).
    """
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given"
    prefixes = [dataset.prefix for dataset in config.data.training_datasets]
    absent = [prefix for prefix in prefixes if not any(Path(name).is_file() for name in _indexes(prefix))]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return f"{absent[0]}{more} of {len(prefixes)} datasets have no index (*_document.idx) here"
    tokenizer = Path(config.tokenizer_source)
    return "" if tokenizer.is_dir() else f"{tokenizer}, which has the tokenizer, is no directory"


def _indexes(prefix: str) -> list[str]:
    return [f"{prefix}_{half}_document.idx" for half in ("inputs", "text")]
