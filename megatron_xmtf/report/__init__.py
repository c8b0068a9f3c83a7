"""Offline HTML reports: one file with tables and drawn pictures, no network, no script."""

from megatron_xmtf.report.heatmap import language_task_heatmap
from megatron_xmtf.report.page import Html, Page, escape
from megatron_xmtf.report.pictures import Change, change_bars, loss_curves

__all__ = ["Change", "Html", "Page", "change_bars", "escape", "language_task_heatmap", "loss_curves"]
