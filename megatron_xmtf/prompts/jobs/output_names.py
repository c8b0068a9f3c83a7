"""Names of rendered files, as xP3 has them.

    language, dataset, config, split, template             file
    zh        GEM/wiki_lingua  zh  train  rephrase it      zh/xp3_GEM_wiki_lingua_zh_train_rephrase_it.jsonl
    en        ag_news          -   train  classify+3shot   en/xp3_ag_news_None_train_classify+3shot.jsonl

`/` and white space become `_`, a missing config is the literal `None`. A name over 240 bytes (templates named in
scripts of three bytes a letter) is cut, and ends in 8 digits of its hash.

Source:  bigscience-workshop/bigscience, data/xp3/prepare_xp3_train.py (its names have no bound).
"""

from __future__ import annotations

import hashlib
import re

from megatron_xmtf.errors import ConfigError

__all__ = ["output_name"]

MAX_NAME_BYTES = 240
"""Of 255 that file systems allow, less what a temporary name adds."""


def output_name(*, prefix: str, language: str, dataset: str, config: str | None, split: str, template: str) -> str:
    """Return the path of a template's records, relative to the output directory.

    Raises:  ConfigError: a part holds a control character, or the language is no plain name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", language):
        raise ConfigError(f"language {language!r} is not a plain code, as et or zho_Hans; it names a directory.")
    name = "_".join((prefix, dataset, str(config), split, template))
    name = re.sub(r"[/\s]", "_", name)
    if not name.isprintable():
        raise ConfigError(f"{name!r} holds a control character and cannot name a file; rename the template or config.")
    encoded = name.encode("utf-8")
    if len(encoded) > MAX_NAME_BYTES - len(".jsonl.tmp-01234567"):
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        name = f"{encoded[: MAX_NAME_BYTES - 40].decode('utf-8', 'ignore')}_{digest}"
    return f"{language}/{name}.jsonl"
