"""Duplicates in the training data, and evaluation texts in it: found, counted, left out on request."""

from megatron_xmtf.data.guards.evaluation_index import EvaluationText
from megatron_xmtf.data.guards.flags import GuardFlags, guards_key, open_flags
from megatron_xmtf.data.guards.scan import scan
from megatron_xmtf.data.guards.settings import GuardSettings

__all__ = ["EvaluationText", "GuardFlags", "GuardSettings", "guards_key", "open_flags", "scan"]
