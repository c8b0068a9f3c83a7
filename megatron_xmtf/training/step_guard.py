"""Bad numbers stop before the weights: NaN and Inf in loss, gradients or weights, and losses that jump.

    forward, backward -> totals of the loss -> verdict, the same on all ranks -> update, or none

Megatron-Core checks for Inf in fp16 alone; in fp32 and bf16 a NaN gradient makes the norm NaN, clipping multiplies all
gradients by it, and one update later every weight of every rank is NaN. So each rank looks at its gradient buffers
before the update (one read, 4 bytes a parameter) and the verdict travels in an all-reduce that every step has.
A step that is passed over costs its rows: weights, moments and step counts stay, the next step reads the next rows.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_xmtf.checkpoint.agreement import from_rank_zero, gather
from megatron_xmtf.config.optimization import LossConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.errors import NonFiniteError
from megatron_xmtf.models.forward import MicroBatch
from megatron_xmtf.training.group_losses import BadExample

__all__ = ["BAD_STEPS", "StepGuard", "check_finite_weights", "has_bad_gradients"]

logger = logging.getLogger(__name__)

BAD_STEPS = "bad_steps.jsonl"
"""In the run directory, one object a bad step: `step, reason, loss, action, examples`."""
NAMED = 5
"""Examples named in a message; the file names all."""

Reason = Literal["loss", "gradient", "spike", "after a spike"]


def has_bad_gradients(chunks: Sequence[Any]) -> bool:
    """Whether NaN or Inf is in this rank's gradients, or values whose squares overflow; waits for the device."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    norms = torch.stack([torch.linalg.vector_norm(buffer.float()) for buffer in buffers])
    return not bool(torch.isfinite(norms.square().sum()))


def check_finite_weights(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, step: int) -> None:
    """Check weights and main parameters of all ranks; a collective call, one read of them.

    Raises:  NonFiniteError: on all ranks, names a parameter.
    """
    named = [(name, tensor) for chunk in chunks for name, tensor in chunk.named_parameters()]
    own = {id(tensor) for _, tensor in named}  # in fp32 they are the main parameters as well
    main = [tensor for group in optimizer.param_groups for tensor in group["params"] if id(tensor) not in own]
    named += [("a main parameter", tensor) for tensor in main]
    bad = [name for name, tensor in named if not bool(torch.isfinite(tensor.detach()).all())]
    flag = torch.tensor(bool(bad), dtype=torch.int32, device=named[0][1].device if named else None)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    if not flag:
        return
    rank, names = next((rank, names) for rank, names in enumerate(gather(bad)) if names)
    raise NonFiniteError(
        f"step {step}: {len(names)} tensors of rank {rank} hold NaN or Inf, {names[0]} first. No checkpoint of them is "
        "written; the last one is untouched. Resume with a lower optimizer.lr."
    )


class StepGuard:
    """Decides about each step before its update; every method is called by all ranks together.

    Args:    settings: `loss` of the configuration. output: run directory. resumed_step: what was decided up to it is
             read back from the run's own records, so that a resumed run decides as one that was never stopped.
    """

    def __init__(
        self, settings: LossConfig, *, output: Path, resumed_step: int, datasets: Sequence[ExampleDataset]
    ) -> None:
        self._settings, self._datasets = settings, list(datasets)
        self._path = output / BAD_STEPS
        self._losses: deque[float] = deque(maxlen=settings.spike_window or 1)
        recorded = from_rank_zero(lambda: _recorded(output, resumed_step)) if resumed_step else ({}, {})
        bad, losses = recorded
        self._skipped = len(bad)
        spikes = [step for step, reason in bad.items() if reason == "spike"]
        self._skip_until = max(spikes, default=0) + settings.spike_skip_steps - 1 if spikes else 0
        self._losses.extend(loss for step, loss in sorted(losses.items()) if step not in bad)

    def reason(self, step: int, loss: float, *, bad_gradients: bool) -> Reason | None:
        """Say what is wrong with a step, from numbers that are the same on all ranks; None: update."""
        if not math.isfinite(loss):
            return "loss"
        if bad_gradients:
            return "gradient"
        if self._is_spike(loss):
            self._skip_until = max(self._skip_until, step + self._settings.spike_skip_steps - 1)
            return "spike"
        if step <= self._skip_until:
            return "after a spike"
        self._losses.append(loss)
        return None

    def pass_over(
        self, step: int, loss: float, reason: Reason, *, bad: Sequence[BadExample], batches: Sequence[MicroBatch]
    ) -> None:
        """Record a bad step with its examples, and return if it may be passed over.

        Args:    bad: examples whose own losses are not finite, on the last stage. batches: this rank's micro-batches.
        Raises:  NonFiniteError: on all ranks.
        """
        own = list(bad)
        if not own and _is_first_of_its_rows():
            own = [example for batch in batches for example in _examples(batch, self._datasets)]
        found = sorted({tuple(example) for examples in gather((bool(bad), own)) for example in examples[1]})
        exact = sorted(
            {tuple(example) for marked, examples in gather((bool(bad), own)) if marked for example in examples}
        )
        examples = [dict(zip(("dataset", "language", "example"), example, strict=True)) for example in exact or found]
        is_spike = reason in ("spike", "after a spike")
        goes_on = (is_spike or self._settings.non_finite == "skip") and self._skipped < self._settings.max_skipped_steps
        action = "skipped" if goes_on else "ended"
        if torch.distributed.get_rank() == 0:
            line = {"step": step, "reason": reason, "loss": str(loss) if not math.isfinite(loss) else loss}
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({**line, "action": action, "examples": examples}) + "\n")
        named = ", ".join(f"{e['dataset']}/{e['language'] or '-'} #{e['example']}" for e in examples[:NAMED])
        more = f" and {len(examples) - NAMED} more" if len(examples) > NAMED else ""
        what = {"loss": f"loss {loss}", "gradient": f"loss {loss}, NaN or Inf in the gradients"}.get(
            reason, f"loss {loss} ({reason})"
        )
        whose = "examples" if exact else "the step's examples"
        message = f"step {step}: {what}; {whose}: {named}{more} (all in {self._path})."
        if goes_on:
            self._skipped += 1
            if torch.distributed.get_rank() == 0:
                limit = self._settings.max_skipped_steps
                logger.warning("%s Passed over, nothing was updated (%d of %d).", message, self._skipped, limit)
            return
        spent = f" {self._skipped} steps were passed over, loss.max_skipped_steps." if self._skipped else ""
        raise NonFiniteError(
            f"{message}{spent} Nothing was updated and no checkpoint is written; the last one is untouched. Look at "
            "the examples with `xmtf inspect --show`, lower optimizer.lr, or set loss.non_finite=skip."
        )

    def _is_spike(self, loss: float) -> bool:
        window, losses = self._settings.spike_window, self._losses
        if window is None or len(losses) < window:
            return False
        mean = math.fsum(losses) / window
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in losses) / window)
        return loss > mean + self._settings.spike_deviations * deviation


def _is_first_of_its_rows() -> bool:
    """Whether this rank names rows that several ranks have read."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def _examples(batch: MicroBatch, datasets: Sequence[ExampleDataset]) -> list[BadExample]:
    return [
        BadExample.of(datasets[dataset], int(example))
        for row in batch.rows
        for dataset, example in zip(row.dataset_ids, row.example_ids, strict=True)
    ]


def _recorded(output: Path, resumed_step: int) -> tuple[dict[int, str], dict[int, float]]:
    """Return step -> reason of steps passed over, and step -> loss, up to the resumed step."""
    bad, losses = {}, {}
    for name in (BAD_STEPS, "metrics.jsonl"):
        path = output / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            if not line.endswith("}"):  # half a line of a killed run
                continue
            values = json.loads(line)
            if values["step"] > resumed_step:
                continue
            if name != BAD_STEPS:
                losses[values["step"]] = values["loss"]
            elif values["action"] == "skipped":
                bad[values["step"]] = values["reason"]
    return bad, losses
