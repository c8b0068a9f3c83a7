"""What the guards look for, and the bits with which they mark an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_xmtf.data.guards.shingles import Size
from megatron_xmtf.errors import ConfigError

__all__ = ["BITS", "CONTAMINATED_EXACT", "CONTAMINATED_NGRAM", "DUPLICATE", "NEAR_DUPLICATE", "GuardSettings"]

DUPLICATE, NEAR_DUPLICATE, CONTAMINATED_EXACT, CONTAMINATED_NGRAM = 1, 2, 4, 8
BITS = {
    "duplicates": DUPLICATE,
    "near_duplicates": NEAR_DUPLICATE,
    "contamination": CONTAMINATED_EXACT | CONTAMINATED_NGRAM,
}
"""Guard -> bits of an example's flags."""
Action = Literal["off", "report", "drop"]


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """The guards of a run: what is looked for, and what happens to what is found.

    Raises:  ConfigError: a size or share that cannot be.
    """

    duplicates: Action = "report"
    """Examples whose normalised inputs and targets are those of an earlier one. drop: the first is kept."""
    near_duplicates: Action = "off"
    """Examples that are nearly an earlier one (`near_duplicates`)."""
    contamination: Action = "report"
    """Examples that hold an evaluation text (`contamination`)."""
    ngram_words: int = 13
    """Words of the n-grams whose overlap is contamination. 13: GPT-3 (arXiv 2005.14165, appendix C), AlexaTM."""
    ngram_characters: int = 30
    """The same in letters of scripts without spaces: kana, Thai, Lao, Khmer, Myanmar, Tibetan. Han counts 1.5 each."""
    short_ngram_words: int = 8
    """A shorter evaluation text is looked for as a whole if it has this many words. 8: GPT-3."""
    short_ngram_characters: int = 18
    """The same in letters."""
    minimum_overlap: float = 0.0
    """Share of an evaluation text's n-grams that an example must hold, 0 to 1. 0: one of them is enough."""
    jaccard: float = 0.8
    """Least similarity of near duplicates, of their inputs and of their targets."""
    boilerplate: float = 0.2
    """Wording in at least this share of a template's texts is the template's, not their content."""

    def __post_init__(self) -> None:
        for short, full in (("short_ngram_words", "ngram_words"), ("short_ngram_characters", "ngram_characters")):
            lower, upper = getattr(self, short), getattr(self, full)
            if not 2 <= lower <= upper:
                raise ConfigError(f"guards: {short}={lower} and {full}={upper}; 2 <= {short} <= {full} is the rule.")
        for name, low in (("minimum_overlap", 0.0), ("jaccard", 0.1), ("boilerplate", 0.01)):
            value = getattr(self, name)
            if not low <= value <= 1:
                raise ConfigError(f"guards: {name}={value}; it is a share from {low} to 1.")

    @property
    def ngram(self) -> Size:
        """Size of a whole n-gram."""
        return Size(self.ngram_words, self.ngram_characters)

    @property
    def short_ngram(self) -> Size:
        """Size below which a text is not looked for by its wording."""
        return Size(self.short_ngram_words, self.short_ngram_characters)

    def dropped(self) -> tuple[str, ...]:
        """Return the guards whose finds are not to be trained on, for `GuardFlags.excluded`."""
        return tuple(name for name in BITS if getattr(self, name) == "drop")
