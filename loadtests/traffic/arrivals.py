"""When requests arrive: rates over time, and arrival times drawn from them.

Open loop: arrivals do not wait for answers, as users do not wait for each other. A closed loop
slows down with the server and so hides its queue ("coordinated omission").
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


class Rate(Protocol):
    """Requests a second at a time of the run."""

    @property
    def peak_per_s(self) -> float:
        """The highest rate that it ever has."""
        ...

    def per_s(self, at_s: float) -> float:
        """The rate ``at_s`` seconds after the start."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    """The same rate all the time: Poisson arrivals."""

    rate_per_s: float

    @property
    def peak_per_s(self) -> float:
        """The rate itself."""
        return self.rate_per_s

    def per_s(self, at_s: float) -> float:  # noqa: ARG002
        """The rate itself."""
        return self.rate_per_s


@dataclass(frozen=True, slots=True)
class Bursts:
    """A base rate, with a burst of ``burst_s`` seconds every ``every_s``; ``mean_per_s`` in all."""

    mean_per_s: float
    factor: float = 5.0
    burst_s: float = 5.0
    every_s: float = 60.0

    @property
    def base_per_s(self) -> float:
        """The rate between bursts."""
        share = self.burst_s / self.every_s
        return self.mean_per_s / (1 - share + share * self.factor)

    @property
    def peak_per_s(self) -> float:
        """The rate within a burst."""
        return self.base_per_s * self.factor

    def per_s(self, at_s: float) -> float:
        """A burst ends each period."""
        inside = at_s % self.every_s >= self.every_s - self.burst_s
        return self.peak_per_s if inside else self.base_per_s


@dataclass(frozen=True, slots=True)
class Ramp:
    """From one rate to another, linearly over the run."""

    from_per_s: float
    to_per_s: float
    duration_s: float

    @property
    def peak_per_s(self) -> float:
        """The higher end."""
        return max(self.from_per_s, self.to_per_s)

    def per_s(self, at_s: float) -> float:
        """Somewhere in between."""
        share = min(1.0, at_s / self.duration_s)
        return self.from_per_s + (self.to_per_s - self.from_per_s) * share


@dataclass(frozen=True, slots=True)
class Day:
    """A day in ``duration_s`` seconds: a sine, ``swing`` of its mean down and up."""

    mean_per_s: float
    duration_s: float
    swing: float = 0.7

    @property
    def peak_per_s(self) -> float:
        """At noon."""
        return self.mean_per_s * (1 + self.swing)

    def per_s(self, at_s: float) -> float:
        """Lowest at the start and at the end."""
        return self.mean_per_s * (1 - self.swing * math.cos(2 * math.pi * at_s / self.duration_s))


SHAPES: dict[str, Callable[[float, float], Rate]] = {
    "poisson": lambda mean_per_s, _: Steady(mean_per_s),
    "bursts": lambda mean_per_s, _: Bursts(mean_per_s),
    "ramp": lambda mean_per_s, duration_s: Ramp(0.0, 2 * mean_per_s, duration_s),
    "day": lambda mean_per_s, duration_s: Day(mean_per_s, duration_s),
}
"""By name: (mean rate, duration) to a rate over time with that mean."""


def arrival_times_s(rate: Rate, duration_s: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process with a varying rate, by thinning (Lewis and Shedler, 1979)."""
    if rate.peak_per_s <= 0:
        return
    random_ = random.Random(seed)
    at_s = 0.0
    while True:
        at_s += random_.expovariate(rate.peak_per_s)
        if at_s >= duration_s:
            return
        if random_.random() * rate.peak_per_s <= rate.per_s(at_s):
            yield at_s
