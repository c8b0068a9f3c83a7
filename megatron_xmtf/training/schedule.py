"""The learning rate as a pure function of the step, so that nothing can be out of date after a resume."""

from __future__ import annotations

import math

from megatron_xmtf.config.schema import RunConfig

__all__ = ["learning_rate"]


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the rate of the update that ends `step` (from 1).

    All lengths are counted in rows; one given in steps is the rows of these steps, the first ones or the last. With n
    the rows trained on when the step ends, w those of the warm-up, d those of the final decay and N those of the run:

        warm-up              lr * n / w                                          n <= w
        constant             lr
        linear               min_lr + (lr - min_lr) * (1 - p)                    p = (n - w) / (N - w)
        cosine               min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2
        inverse_square_root  max(min_lr, lr * sqrt(w / n))
        wsd                  lr                                                  n <= N - d
          linear             min_lr + (lr - min_lr) * (1 - q)                    q = (n - (N - d)) / d
          cosine             min_lr + (lr - min_lr) * (1 + cos(pi q)) / 2
          minus_sqrt         min_lr + (lr - min_lr) * (1 - sqrt(q))
          exponential        min_lr + (lr - min_lr) * (2 * 0.5^q - 1)

    linear, cosine and wsd stay at min_lr past the end of the run. Worked example, lr 1, warm-up 2 of 6 steps, wsd with
    a decay of 2:

        step         1    2    3    4    5    6
        linear       0.5  1.0  0.75 0.5  0.25 0.0
        wsd, linear  0.5  1.0  1.0  1.0  0.5  0.0

    and with a batch-size ramp of 2 2 4 4 4 4 rows, so that w = 4, d = 8, N = 20:

        n            2    4    8    12   16   20
        linear       0.5  1.0  0.75 0.5  0.25 0.0
        wsd, linear  0.5  1.0  1.0  1.0  0.5  0.0

    Source:  Megatron-Core's OptimizerParamScheduler; for wsd Hu et al. 2024, arXiv:2404.06395.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    now, end, warmup = config.batch.step_rows.before(step), config.train_rows, config.warmup_rows
    if now < warmup:
        return peak * now / warmup
    if schedule.lr_decay_style == "constant":
        return peak
    if schedule.lr_decay_style == "inverse_square_root":
        return max(schedule.min_lr, peak * math.sqrt(warmup / now))
    if schedule.lr_decay_style == "wsd":
        start, shape = end - config.wsd_decay_rows, schedule.lr_wsd_decay_style
    else:
        start, shape = warmup, schedule.lr_decay_style
    if now <= start:
        return peak
    progress = min(1.0, (now - start) / max(end - start, 1))
    return schedule.min_lr + (peak - schedule.min_lr) * _remaining(shape, progress)


def _remaining(shape: str, progress: float) -> float:
    """Return which share of the way from `min_lr` to `lr` is left after `progress` of a decay."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "minus_sqrt":
        return 1.0 - math.sqrt(progress)
    assert shape == "exponential", f"the schema knows no shape {shape}"
    return 2.0 * 0.5**progress - 1.0
