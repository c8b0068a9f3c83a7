"""fp16's loss scale: say so when gradients overflow step after step and nothing is trained."""

from __future__ import annotations

import logging

__all__ = ["OverflowWatch"]

logger = logging.getLogger(__name__)

FIRST_WARNING = 5
"""Overflows in a row before the first warning. A healthy run has one or two each time its scale has doubled:
Megatron-Core halves it from the second one on (hysteresis 2)."""


class OverflowWatch:
    """Count steps in a row that overflowed; warn at the 5th, 10th, 20th, 40th ...

    Args:  enabled: whether this rank is the one that speaks.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._in_a_row = 0
        self._next_warning = FIRST_WARNING

    def after_step(self, step: int, *, skipped: bool, loss_scale: float | None) -> None:
        """Take note of a step.

        Args:  skipped: its gradients overflowed and nothing was updated. loss_scale: that it ran with; None: not fp16.
        """
        if not skipped:
            self._in_a_row, self._next_warning = 0, FIRST_WARNING
            return
        self._in_a_row += 1
        if self._in_a_row < self._next_warning:
            return
        self._next_warning *= 2
        if self._enabled:
            logger.warning(
                "steps %d to %d: gradients overflowed in fp16 %d times in a row and nothing was updated; the loss "
                "scale has fallen to %g. %s",
                step - self._in_a_row + 1,
                step,
                self._in_a_row,
                loss_scale,
                _remedy(loss_scale),
            )


def _remedy(loss_scale: float | None) -> str:
    if loss_scale is not None and loss_scale > 1.0:
        return (
            "It is halved until steps are finite; if that does not end, lower optimizer.lr, resume from an earlier "
            "checkpoint (checkpoint.resume=STEP), or train with precision=bf16."
        )
    return (
        "It cannot fall further: the weights or the data make fp16 overflow. Resume from an earlier checkpoint "
        "(checkpoint.resume=STEP) with a lower optimizer.lr, or train with precision=bf16 or fp32."
    )
