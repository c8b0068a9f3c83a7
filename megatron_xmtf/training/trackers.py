"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard and Weights & Biases, on rank 0 alone.

Both packages are optional; one that is asked for and absent is an error before training starts. Keys are those of
`metrics.jsonl`. A resumed run goes on in the same place: TensorBoard hides what an earlier part wrote past the resumed
step, Weights & Biases gets the same run id, which `OUT/wandb.json` keeps.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_xmtf.config.schema import LoggingConfig, RunConfig, WandbConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import read_json, write_json

__all__ = ["TensorBoard", "Tracker", "WeightsAndBiases", "check_trackers", "open_trackers"]

WANDB_FILE = "wandb.json"
"""In the run directory: {"id": ..., "project": ...} of the run in Weights & Biases."""


class Tracker(Protocol):
    """Takes the numbers of each step; `MetricsFile` is one too."""

    def record(self, values: Mapping[str, Any]) -> None:
        """Take one step's values; `step` is among them."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is still held back; `failed` says how the run ended."""


def check_trackers(config: LoggingConfig) -> None:
    """Check that the packages that the configuration asks for are installed.

    Raises:  ConfigError: one is not; names the key, and how to install it.
    """
    asked = {"tensorboard": config.tensorboard, "wandb": config.wandb is not None}
    for package, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{package} is set, but the package `{package}` is not installed: `pip install {package}`, or "
                f"take the key out (metrics.jsonl has every number)."
            )


def open_trackers(config: RunConfig, *, resumed_step: int) -> list[Tracker]:
    """Open what the configuration asks for; to be called on one rank.

    Args:    resumed_step: steps done already, 0 for a new run.
    Raises:  ConfigError: a package is absent; Weights & Biases takes no run (not logged in, no such project).
    """
    check_trackers(config.logging)
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(Path(config.output) / "tensorboard", resumed_step=resumed_step))
    if config.logging.wandb is not None:
        trackers.append(
            WeightsAndBiases(
                config.logging.wandb, output=Path(config.output), run_config=config.model_dump(mode="json")
            )
        )
    return trackers


class TensorBoard:
    """Event files of one run.

    Args:  resumed_step: what an earlier part of the run wrote after this step is hidden from readers.
    """

    def __init__(self, directory: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1 if resumed_step else None)

    def record(self, values: Mapping[str, Any]) -> None:
        """Write every number of a step; null is left out."""
        step = int(values["step"])
        for key, value in values.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, float(value), step)

    def close(self, *, failed: bool = False) -> None:
        """Write what is held back."""
        self._writer.close()


class WeightsAndBiases:
    """One run in Weights & Biases.

    Curves are drawn over the key `step`, not over W&B's own counter, which cannot go back: a run that is resumed from
    before its last line would lose every line up to there.

    Args:  output: the run directory; it keeps the run id, and W&B's own files. run_config: shown with the run.
    """

    def __init__(self, config: WandbConfig, *, output: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        run_id = _kept_run_id(output, config.project) or uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or output.resolve().name,
                group=config.group,
                tags=config.tags or None,
                mode=config.mode,
                id=run_id,
                # Offline runs of one id become one run when they are synchronised; W&B warns when told so.
                resume="allow" if config.mode == "online" else None,
                dir=str(output),
                config=dict(run_config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            reason = str(error).rstrip(".")
            raise ConfigError(
                f"Weights & Biases takes no run of logging.wandb.project={config.project!r}: {reason}. Log in with "
                "`wandb login`, or set logging.wandb.mode=offline and synchronise later."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_json(output / WANDB_FILE, {"id": run_id, "project": config.project})

    @property
    def run_id(self) -> str:
        """Id that a resumed run goes on under."""
        return str(self._run.id)

    def record(self, values: Mapping[str, Any]) -> None:
        """Send every number of a step; null is left out."""
        self._run.log({key: value for key, value in values.items() if value is not None})

    def close(self, *, failed: bool = False) -> None:
        """Send what is held back and mark the run finished or failed."""
        self._run.finish(exit_code=int(failed))


def _kept_run_id(output: Path, project: str) -> str | None:
    """Return the id of an earlier part of the run; another project starts a run of its own."""
    path = output / WANDB_FILE
    if not path.is_file():
        return None
    kept = read_json(path)
    return str(kept["id"]) if kept["project"] == project else None
