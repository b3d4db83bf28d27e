"""Whether something grows: a slope with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = 20
"""Blocks that a series is averaged into. Neighbouring samples of one process are alike, so that a
line through all of them would claim to be far more certain than it is."""
MIN_BLOCKS = 4
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Growth an hour, and the ends of its confidence interval, in the series' own unit."""

    per_hour: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Least squares through the means of blocks of a series; None where there are too few points.

    Args:
        points: (seconds, value), in order of time.
    """
    blocks = _block_means(points)
    degrees = len(blocks) - 2
    if len(blocks) < MIN_BLOCKS:
        return None
    times = [at_s / 3600 for at_s, _ in blocks]
    values = [value for _, value in blocks]
    middle, mean = statistics.fmean(times), statistics.fmean(values)
    spread = sum((at - middle) ** 2 for at in times)
    if spread == 0:
        return None
    pairs = list(zip(times, values, strict=True))
    per_hour = sum((at - middle) * (value - mean) for at, value in pairs) / spread
    left = sum((value - mean - per_hour * (at - middle)) ** 2 for at, value in pairs)
    half = student_t(degrees) * math.sqrt(left / degrees / spread)
    return Slope(per_hour=per_hour, low=per_hour - half, high=per_hour + half)


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t (Abramowitz and Stegun, 26.7.5)."""
    x: float = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(
        term / float(degrees) ** power for power, term in enumerate(terms, start=1)
    )


def _block_means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(1, len(points) // BLOCKS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    if len(blocks) > 1 and len(blocks[-1]) < size:  # a rest would count as much as a whole one
        blocks.pop()
    return [
        (statistics.fmean(at_s for at_s, _ in block), statistics.fmean(value for _, value in block))
        for block in blocks
    ]
