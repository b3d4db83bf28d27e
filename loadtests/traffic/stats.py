"""Small statistics that the reports share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def windows(
    points: Sequence[tuple[float, float]], width_s: float
) -> list[tuple[float, list[float]]]:
    """(time, value) pairs gathered in windows of ``width_s``: (middle of the window, values)."""
    gathered: dict[int, list[float]] = {}
    for at_s, value in points:
        gathered.setdefault(int(at_s // width_s), []).append(value)
    return [((index + 0.5) * width_s, gathered[index]) for index in sorted(gathered)]
