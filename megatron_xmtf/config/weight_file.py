"""Read the weight files of bigscience-workshop/xmtf as they are.

    "train: 0.39 0:0.950 /data/xp3_en, 0.08 0:0.950 /data/xp3_es"

    group    weight  documents   prefix
    train    0.39    0:0.950     /data/xp3_en        -> one entry of a mixture each
             0.08    0:0.950     /data/xp3_es

A group stands in double quotes or not; a file may hold several ("validation: ..." "validation_pretraining: ..."). A
path may end in `_text_document` (data of plain text). Weights need not sum to 1 (those of the published training file
sum to 1.0137): only their proportions count. The documents of an interval are chosen by a hash here, not by their
place in the file: "0:0.950" for training and "0.950:1" for validation share none, for any number of templates.
Source:  xmtf/xp3capmixnewcodelong_train.txt; `--train-weighted-split-paths` of Megatron-DeepSpeed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import ConfigError

__all__ = ["parse_weight_file"]

HALF_ENDINGS = ("_text_document", "_inputs_document", "_targets_document")


def parse_weight_file(text: str, *, source: str, keep_directories: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of a file: name -> entries {"prefix", "weight", "split"}.

    Args:    source: the file, for error messages. keep_directories: False keeps the last part of each path only,
             for data that lie elsewhere.
    Raises:  ConfigError: no group, one twice, an entry that is not WEIGHT FROM:TO PATH.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for quoted in re.findall(r'"([^"]*)"', text) or [text]:
        name, separator, listed = quoted.strip().partition(": ")
        if not separator or not name or name in groups:
            raise ConfigError(
                f"{source} is not a weight file: it needs groups of the form "
                '"train: WEIGHT FROM:TO PATH, WEIGHT FROM:TO PATH", each with a name of its own.'
            )
        groups[name] = [
            _entry(part, f"{source}: group {name!r}, entry {number}", keep_directories)
            for number, part in enumerate(listed.split(","), 1)
        ]
    return groups


def _entry(part: str, where: str, keep_directories: bool) -> dict[str, Any]:
    words = part.split(maxsplit=2)
    try:
        weight, split, path = float(words[0]), words[1], words[2].strip()
    except (ValueError, IndexError):
        raise ConfigError(f"{where}, {part.strip()!r}, is not WEIGHT FROM:TO PATH.") from None
    for ending in HALF_ENDINGS:
        path = path.removesuffix(ending)
    return {"prefix": path if keep_directories else Path(path).name, "weight": weight, "split": split}
