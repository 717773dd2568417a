"""Percentiles of what was measured. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PERCENTILES = (50, 90, 95, 99)
Summary = dict[str, float]
"""mean, p50, p90, p95, p99, max; of nothing: empty."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, linear between the two nearest ranks (as numpy's default). Raises ValueError for none, or a percent outside
    [0, 100]."""
    if not ordered or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(ordered)} values")
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(values: Iterable[float]) -> Summary:
    """Of values in any order and unit."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {"mean": math.fsum(ordered) / len(ordered), **found, "max": ordered[-1]}
