"""How many examples of each component one pass over a mixture draws: pure arithmetic on a tree of sizes.

    group           a child has the rate weight, or size ** (1 / temperature); its part is rate / sum of rates
    size            its examples (times their mean tokens, if tokens count), at most `cap`; of a group: the sum
    floors          components that must have a part together; what they gain the others lose in proportion
    limits          draws left under `max_epochs`; what a component cannot take, its nearest relatives take

    A 90,000 (cap 30,000), B 10,000 under a group of weight 3; C 5,000 of weight 1     parts 9/16, 3/16, 4/16

A pass is as long as the sizes together, and shorter where that would draw an example twice (A of 10 with a part of one
half: 20) or use a component up: repeats come as late as the parts allow, and until something is used up they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.errors import ConfigError

__all__ = ["Floor", "ShareNode", "pass_quotas", "share_counts", "wanted_shares"]

FLOOR_ROUNDS = 1000
FLOOR_TOLERANCE = 1e-9
SHORTEST_PASS = 64
"""A pass is at least 1/64 of the whole: hundreds of components that run out one by one must not make tiny passes."""
Floats = NDArray[np.float64]


@dataclass
class ShareNode:
    """A component (no children) or a group of them."""

    size: float = 0.0
    """Of a component, in the mixture's unit, before the cap."""
    children: list[ShareNode] = field(default_factory=list)
    weight: float | None = None
    cap: float | None = None
    temperature: float = 1.0

    def leaves(self) -> list[ShareNode]:
        """Return the components below, in order."""
        return [leaf for child in self.children for leaf in child.leaves()] if self.children else [self]

    def counted_size(self) -> float:
        """Return the size that decides about shares."""
        size = sum(child.counted_size() for child in self.children) if self.children else self.size
        return size if self.cap is None else min(size, self.cap)

    def rate(self, temperature: float) -> float:
        """Return the rate among siblings, whose group has this temperature."""
        return self.weight if self.weight is not None else self.counted_size() ** (1.0 / temperature)


@dataclass(frozen=True)
class Floor:
    """Components that together have at least a fraction of the whole."""

    name: str
    leaves: NDArray[np.int64]
    fraction: float


def share_counts(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` examples in proportion to `weights`, exactly, by largest remainder.

    >>> share_counts(10, [1, 3])
    [3, 7]
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    shares = [total * weight / whole for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def wanted_shares(root: ShareNode, floors: Sequence[Floor] = ()) -> Floats:
    """Return the part of the whole that each component should have; they sum to 1.

    Raises:  ConfigError: floors that cannot all be met.
    """
    unlimited = np.full(len(root.leaves()), np.inf)
    return _raise_to_floors(_fill(root, 1.0, unlimited), floors, unlimited)


def pass_quotas(root: ShareNode, limits: Floats, floors: Sequence[Floor] = (), *, shortest: float = 0.0) -> Floats:
    """Return how much of each component the next pass draws, in the unit of the sizes.

    Args:    limits: [components], what may still be drawn; inf without `max_epochs`. shortest: size that a pass should
             have although it repeats examples; where a component is used up it ends sooner, though not before 1/64.
    Returns: [components]; all zero when nothing may be drawn any more.
    """
    open_limits = np.where(limits > 0, np.inf, 0.0)
    if not open_limits.any():
        return np.zeros_like(limits)
    shares = _raise_to_floors(_fill(root, 1.0, open_limits), floors, open_limits)
    whole = root.counted_size()
    drawn = shares > 0
    once = np.array([leaf.size for leaf in root.leaves()])[drawn] / shares[drawn]
    length = min(whole, max(shortest, whole / SHORTEST_PASS, float(once.min())))
    soonest = float(np.min(limits[drawn] / shares[drawn]))
    if soonest >= length:
        return shares * length
    length = max(soonest, whole / SHORTEST_PASS)
    return _raise_to_floors(_fill(root, length, limits), floors, limits)


def _fill(node: ShareNode, quota: float, limits: Floats) -> Floats:
    """Divide a quota over the components of a node; what a child cannot take goes to its siblings."""
    if not node.children:
        return np.minimum(quota, limits)
    counts = [len(child.leaves()) for child in node.children]
    parts = np.split(limits, np.cumsum(counts)[:-1])
    rates = np.array([child.rate(node.temperature) for child in node.children])
    quotas = _pour(quota, rates, np.array([part.sum() for part in parts]))
    return np.concatenate(
        [_fill(child, own, part) for child, own, part in zip(node.children, quotas.tolist(), parts, strict=True)]
    )


def _pour(quota: float, rates: Floats, limits: Floats) -> Floats:
    """Divide a quota in proportion to rates, none above its limit: min(limit, level * rate) with one level for all."""
    rates = np.where(limits > 0, rates, 0.0)
    if quota >= limits.sum():
        return limits.copy()
    given = np.zeros_like(rates)
    full = rates <= 0
    while not full.all():
        left = quota - given[full].sum()
        level = left / rates[~full].sum()
        over = ~full & (level * rates >= limits)
        if not over.any():
            given[~full] = level * rates[~full]
            return given
        given[over] = limits[over]
        full |= over
    return given


def _raise_to_floors(shares: Floats, floors: Sequence[Floor], limits: Floats) -> Floats:
    """Give every floor its part, as far as the limits allow; the rest keep their proportions."""
    whole = shares.sum()
    if not floors or whole <= 0:
        return shares
    rates = shares.copy()
    current = shares
    for _ in range(FLOOR_ROUNDS):
        missing = [floor for floor in floors if _is_short(floor, current, whole, limits)]
        if not missing:
            return current
        for floor in missing:
            sum_now = current[floor.leaves].sum()
            rates[floor.leaves] *= floor.fraction * whole / sum_now if sum_now > 0 else 1.0
        current = _pour(whole, rates, limits)
        rates = np.where(current > 0, current, rates)
    names = ", ".join(f"{floor.name} {floor.fraction:g}" for floor in missing[:4])
    raise ConfigError(
        f"the floors cannot all be met: {names} remain short, and the floors ask for "
        f"{sum(floor.fraction for floor in floors):g} of the mixture in all. Lower them."
    )


def _is_short(floor: Floor, shares: Floats, whole: float, limits: Floats) -> bool:
    now = shares[floor.leaves]
    can_grow = bool(np.any((now > 0) & (now < limits[floor.leaves] * (1 - FLOOR_TOLERANCE))))
    return can_grow and float(now.sum()) < floor.fraction * whole * (1 - FLOOR_TOLERANCE)
