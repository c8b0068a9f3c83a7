"""The learning rate as a pure function of the step, so that nothing can be out of date after a resume."""

from __future__ import annotations

import math

from megatron_xmtf.config.schema import RunConfig

__all__ = ["learning_rate"]


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the rate of the update that ends `step` (from 1).

        warm-up          step / lr_warmup_steps * lr              up to lr_warmup_steps
        constant         lr
        linear           lr -> min_lr, reached at the last step
        cosine           the same, along half a cosine

    >>> from types import SimpleNamespace as N
    >>> run = N(optimizer=N(lr=1.0), schedule=N(lr_warmup_steps=2, lr_decay_style="linear", min_lr=0.0), train_steps=6)
    >>> [learning_rate(run, step) for step in range(1, 7)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step <= schedule.lr_warmup_steps:
        return peak * step / schedule.lr_warmup_steps
    if schedule.lr_decay_style == "constant":
        return peak
    decay_steps = max(1, config.train_steps - schedule.lr_warmup_steps)
    progress = min(1.0, (step - schedule.lr_warmup_steps) / decay_steps)
    if schedule.lr_decay_style == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_lr + (peak - schedule.min_lr) * remaining
