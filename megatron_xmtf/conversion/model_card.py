"""The README.md of an exported model."""

from __future__ import annotations

import importlib.metadata
from pathlib import PurePath

from megatron_xmtf.checkpoint.manifest import CheckpointManifest

__all__ = ["model_card"]


AUTO_CLASSES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
}
"""How the name of a model's class ends -> the class that opens it, and the hub's name of what it does."""


def model_card(
    manifest: CheckpointManifest, *, dtype: str, parameters: int, architecture_class: str, prefix_lm: bool
) -> str:
    """Word the README.md of an exported model: what it is, and how to open it.

    Args:  architecture_class: its class in `transformers`. prefix_lm: whether it was trained to read inputs in both
           directions, which that class does not.
    """
    [(auto_class, pipeline_tag)] = [
        entry for ending, entry in AUTO_CLASSES.items() if architecture_class.endswith(ending)
    ]
    version = importlib.metadata.version("megatron_xmtf")
    config = manifest.config or {}
    # The last part of a prefix: where the data lay on the machine that trained is nobody's business.
    sources = ", ".join(
        entry.get("name") or PurePath(entry["prefix"]).name for entry in config.get("data", {}).get("train", [])
    )
    trained = (
        f"Finetuned for {manifest.step:,} steps on {manifest.consumed_rows:,} packed rows"
        + (f" of {sources}" if sources else "")
        if manifest.step
        else "Converted without training"
    )
    warning = (
        "\n\n**Prefix-LM.** It was trained to read its inputs in both directions (`prefix_lm` in config.json). The "
        "class below reads them causally, so it computes something else unless it is given a mask of its own."
        if prefix_lm
        else ""
    )
    shape = ", ".join(f"{name} {value}" for name, value in manifest.architecture.items())
    return f"""---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- {manifest.architecture["family"]}
- megatron_xmtf
---

# Model card

{trained}. {parameters:,} parameters in {dtype}. Written by megatron_xmtf {version}.{warning}

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Architecture: {shape}.
"""
