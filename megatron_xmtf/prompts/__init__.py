"""Text only: dataset files -> rows -> prompted records, with templates in a sandbox.

read_rows(source)  ->  render_rows(rows, load_templates(path), seed=0)  ->  PromptedRecord, PromptedRecord, ...
"""

from megatron_xmtf.prompts.readers.bad_rows import BadRowError, RowReport
from megatron_xmtf.prompts.rendering.prompted_record import PromptedRecord
from megatron_xmtf.prompts.rendering.render import render_identified_rows, render_rows
from megatron_xmtf.prompts.rendering.render_report import RenderReport, TemplateCounts
from megatron_xmtf.prompts.rendering.sandbox import RenderLimits
from megatron_xmtf.prompts.rows import read_rows
from megatron_xmtf.prompts.sources import Source, source_from_mapping
from megatron_xmtf.prompts.templates.template import Template, select_templates
from megatron_xmtf.prompts.templates.template_files import load_templates, parse_templates

__all__ = [
    "BadRowError",
    "PromptedRecord",
    "RenderLimits",
    "RenderReport",
    "RowReport",
    "Source",
    "Template",
    "TemplateCounts",
    "load_templates",
    "parse_templates",
    "read_rows",
    "render_identified_rows",
    "render_rows",
    "select_templates",
    "source_from_mapping",
]
