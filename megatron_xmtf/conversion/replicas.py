"""Copies of one weight on several tensor-parallel ranks that may have drifted apart: which value is taken.

Megatron-DeepSpeed's ranks each updated their own LayerNorms and row-parallel biases, and those of BLOOM-176B were no
longer equal when it was converted. The published model holds their average as `transformers`' converter computes it:

    bf16 copies  1.0000  1.0078  1.0000  1.0000      summed one after another in bf16, then divided: 1.0000
                                                     mean in fp32:                                   1.0020

Copies that are equal are taken as they are, which for 1, 2 and 4 ranks is what that converter computes too.
Source:  transformers, models/bloom/convert_bloom_original_checkpoint_to_pytorch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_xmtf.errors import CheckpointError

__all__ = ["ReplicaRule", "Replicas"]

ReplicaRule = Literal["average", "first", "refuse"]
"""average: as the published models. first: rank 0's. refuse: an error where copies differ."""


@dataclass
class Replicas:
    """Chooses values by a rule and remembers how far copies were apart."""

    rule: ReplicaRule = "average"
    drifts: dict[str, float] = field(default_factory=dict)
    """Parameter and file -> largest difference of a copy from rank 0's; of those whose copies differed."""

    def choose(self, copies: Sequence[torch.Tensor], *, name: str, file: Path) -> torch.Tensor:
        """Return one tensor for the copies of all ranks.

        Args:    copies: of one shape and type, by rank.
        Raises:  CheckpointError: they differ and the rule is refuse.
        """
        first = copies[0]
        if all(torch.equal(first, copy) for copy in copies[1:]):
            return first
        drift = max(float((copy.double() - first.double()).abs().max()) for copy in copies[1:])
        place = f"{name} in {file.name}"
        self.drifts[place] = max(drift, self.drifts.get(place, drift))
        if self.rule == "refuse":
            raise CheckpointError(
                f"{file}: {name} differs between tensor-parallel ranks by up to {drift:.3g}, although every rank holds "
                "a copy of it. --replicas average takes what the published models have, first the first rank's."
            )
        if self.rule == "first":
            return first
        total = first.clone()
        for copy in copies[1:]:
            total += copy
        return total / len(copies)
