"""Objectives: documents -> examples of inputs and targets, as they are read."""

from megatron_xmtf.data.objectives.dataset import ObjectiveCounts, ObjectiveDataset
from megatron_xmtf.data.objectives.stored import StoredDatasets

__all__ = ["ObjectiveCounts", "ObjectiveDataset", "StoredDatasets"]
