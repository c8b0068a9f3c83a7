"""Evaluation by rank classification and generation, on a checkpoint or a Hugging Face directory."""

from megatron_xmtf.evaluation.results import EvaluatedModel, TaskResult, write_results
from megatron_xmtf.evaluation.tasks import Task, load_tasks

__all__ = ["EvaluatedModel", "Task", "TaskResult", "load_tasks", "write_results"]
