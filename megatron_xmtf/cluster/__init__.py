"""Slurm: render job scripts, check before a queue is waited for, submit, requeue, tell how jobs are."""

from megatron_xmtf.cluster.attempts import Decision, Limits, begin_attempt, end_attempt
from megatron_xmtf.cluster.checks import Finding
from megatron_xmtf.cluster.render import TrainingRun, render_commands, render_train

__all__ = [
    "Decision",
    "Finding",
    "Limits",
    "TrainingRun",
    "begin_attempt",
    "end_attempt",
    "render_commands",
    "render_train",
]
