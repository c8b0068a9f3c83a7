"""Text only: dataset files -> rows -> prompted records, with templates in a sandbox.

read_rows(source)  ->  render_rows(rows, load_templates(path), seed=0)  ->  PromptedRecord, PromptedRecord, ...
"""

from megatron_xmtf.prompts.render import (
    PromptedRecord,
    RenderReport,
    TemplateCounts,
    render_identified_rows,
    render_rows,
)
from megatron_xmtf.prompts.sandbox import RenderLimits
from megatron_xmtf.prompts.sources import Source, read_rows, source_from_mapping
from megatron_xmtf.prompts.templates import Template, load_templates, parse_templates, select_templates

__all__ = [
    "PromptedRecord",
    "RenderLimits",
    "RenderReport",
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
