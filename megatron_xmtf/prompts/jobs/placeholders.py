"""Put what belongs to a language into the names and paths of a job.

language  swh_Latn     prompt_language  sw     path  swa
"data/{path}/train.{prompt_language}.jsonl"    ->    "data/swa/train.sw.jsonl"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_xmtf.errors import ConfigError, nearest_names

__all__ = ["Placeholders"]

PLACEHOLDER = re.compile(r"\{([a-z][a-z_]*)\}")


@dataclass(frozen=True)
class Placeholders:
    """What stands for each name in one language of an entry."""

    values: Mapping[str, str]
    """`language`, `prompt_language`, and what the entry gives for each language beside them."""
    where: str
    """What to name in an error."""

    @property
    def language(self) -> str:
        """Language of the rows."""
        return self.values["language"]

    @property
    def prompt_language(self) -> str:
        """Language of localised templates."""
        return self.values["prompt_language"]

    def text(self, text: str) -> str:
        """Fill one text.

        Raises:  ConfigError: a name in braces that stands for nothing.
        """
        return PLACEHOLDER.sub(self._value_of, text)

    def value(self, value: Any) -> Any:
        """Fill every text of a nested value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(one) for one in value]
        if isinstance(value, dict):
            return {name: self.value(one) for name, one in value.items()}
        return value

    def _value_of(self, found: re.Match[str]) -> str:
        name = found[1]
        if name not in self.values:
            raise ConfigError(
                f"{self.where}: {found.string!r}: nothing stands for {found[0]}; {nearest_names(name, self.values)} "
                "(names of your own: languages: {swh_Latn: {prompt: sw, path: swa}})."
            )
        return self.values[name]
