"""Read a sweep: several runs of one configuration, each with overrides of its own, in an array of jobs.

more_code: [data.mixture=code.yaml]        ->  OUTPUT/more_code
more_code_slow: [data.mixture=code.yaml, optimizer.lr=1e-5]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_xmtf.config.load import load_config, load_yaml
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError

__all__ = ["load_sweep"]

TAKEN = (".", "..", "slurm", "checkpoints")
"""Names that a run directory has for other things."""


def load_sweep(
    sweep: str, config: str, overrides: Sequence[str], *, overlays: Sequence[str], output: str
) -> dict[str, RunConfig]:
    """Return the configuration of each run by its name.

    Args:    sweep: a YAML file, name -> list of overrides. config, overrides, overlays: what all of them start from.
             output: the directory above theirs.
    Raises:  ConfigError: fewer than two runs, a name that is no directory's, an override of what one script serves all
             runs with.
    """
    values = load_yaml(sweep)
    if not isinstance(values, dict) or not all(isinstance(each, list) for each in values.values()) or len(values) < 2:
        raise ConfigError(f"{sweep}: a sweep is a mapping of two or more names to lists of overrides.")
    configs = {}
    for name, words in ((str(name), [str(word) for word in words]) for name, words in values.items()):
        if Path(name).name != name or name in TAKEN:
            raise ConfigError(f"{sweep}: {name!r} cannot be the name of a run's directory.")
        refused = [word for word in words if word.startswith(("slurm", "output"))]
        if refused:
            raise ConfigError(f"{sweep}: {name}: {refused[0]}: one job script serves all runs of a sweep.")
        configs[name] = load_config(config, [*overrides, *words, f"output={Path(output) / name}"], overlays=overlays)
    return configs
