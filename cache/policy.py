"""Which state to evict: the one with the lowest score. A score changes only when a state is used.

Benefit is measured in steps of the UNet saved, for each state. ``lcbfu`` is NIRVANA's policy
(Agarwal et al., NSDI 2024: evict the least uses x steps saved) without its three faults: a new
state counts as used once, so that it is not the first to go; every use counts half as much after
each half-life; and benefit is per byte. With u uses of s_i steps at times t_i it ranks by

    sum_i s_i 2^((t_i - t) / half_life) / bytes,

whose order between two states does not depend on t. Its logarithm at t = 0 is therefore a score
that ages without being rewritten: log2 of benefit + t / half_life, added up in the log domain.

``gdsf`` is the same benefit (uses x steps saved, per byte, a new state counted as used once) aged
by the clock of evictions instead of the wall's. That clock runs as fast as the cache turns over, so
that one rule fits every size, where the best half-life goes from minutes to hours: it is the
default (``python -m loadtests.cache_policies`` compares them).

The Redis script computes the same scores (:mod:`cache.scripts`); one contract test runs on both.
"""

# ruff: noqa: ARG002  (each policy takes what it needs of the facts)
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from engine.errors import InvalidRequestError

DEFAULT_HALF_LIFE_S = 300.0
"""Of a use's worth under ``lcbfu``: what loses least over all sizes of the cache."""
DEFAULT_POLICY = "gdsf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a policy may know when a state is stored or used.

    Attributes:
        uses: of the state, this one included; 0 when it is stored.
        steps_saved: by this use, or by a typical one when it is stored.
        size_bytes: what its namespace is charged for it.
        now_s: Unix time.
        floor: highest score evicted so far (the clock of GDSF); 0 before.
    """

    uses: int
    steps_saved: int
    size_bytes: int
    now_s: float
    floor: float = 0.0


class EvictionPolicy(ABC):
    """Scores states; the lowest is evicted first."""

    name: str
    half_life_s: float = 0.0
    """Of a use's worth; 0 where uses do not age."""

    @abstractmethod
    def stored(self, facts: Facts) -> float:
        """Score of a new state."""

    @abstractmethod
    def used(self, score: float, facts: Facts) -> float:
        """Score of a state after a use, from the one before."""


class Fifo(EvictionPolicy):
    """The oldest goes."""

    name = "fifo"

    def stored(self, facts: Facts) -> float:
        """Time of storing."""
        return facts.now_s

    def used(self, score: float, facts: Facts) -> float:
        """Unchanged."""
        return score


class Lru(EvictionPolicy):
    """The least recently used goes."""

    name = "lru"

    def stored(self, facts: Facts) -> float:
        """Time of storing."""
        return facts.now_s

    def used(self, score: float, facts: Facts) -> float:
        """Time of use."""
        return facts.now_s


class Lfu(EvictionPolicy):
    """The least often used goes."""

    name = "lfu"

    def stored(self, facts: Facts) -> float:
        """Not used yet."""
        return 0.0

    def used(self, score: float, facts: Facts) -> float:
        """Number of uses."""
        return float(facts.uses)


class PublishedLcbfu(EvictionPolicy):
    """LCBFU as NIRVANA has it: uses x steps saved, without age, size or a fair start."""

    name = "lcbfu-published"

    def stored(self, facts: Facts) -> float:
        """Nothing saved yet."""
        return 0.0

    def used(self, score: float, facts: Facts) -> float:
        """Steps saved in all its uses."""
        return score + facts.steps_saved


class Gdsf(EvictionPolicy):
    """Greedy-dual size frequency (Cherkasova, 1998): clock + frequency x cost / size."""

    name = "gdsf"

    def stored(self, facts: Facts) -> float:
        """As if used once."""
        return facts.floor + facts.steps_saved / facts.size_bytes

    def used(self, score: float, facts: Facts) -> float:
        """The clock moves only with evictions, so that scores age without being rewritten."""
        return facts.floor + (facts.uses + 1) * facts.steps_saved / facts.size_bytes


class Lcbfu(EvictionPolicy):
    """LCBFU with a fair start, ageing, and bytes: see the module's text."""

    name = "lcbfu"

    def __init__(self, half_life_s: float = DEFAULT_HALF_LIFE_S) -> None:
        if not 0.0 < half_life_s < math.inf:
            raise InvalidRequestError(f"half_life_s is {half_life_s}; allowed: above 0")
        self.half_life_s = half_life_s

    def stored(self, facts: Facts) -> float:
        """As if used once."""
        benefit = max(facts.steps_saved, 1) / facts.size_bytes
        return math.log2(benefit) + facts.now_s / self.half_life_s

    def used(self, score: float, facts: Facts) -> float:
        """One more use, added in the log domain."""
        gained = self.stored(facts)
        high, low = max(score, gained), min(score, gained)
        return high + math.log2(1.0 + 2.0 ** (low - high))


POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (Lcbfu, PublishedLcbfu, Gdsf, Lru, Lfu, Fifo)
}


def policy_named(name: str, *, half_life_s: float = DEFAULT_HALF_LIFE_S) -> EvictionPolicy:
    """A policy by its name; ``half_life_s`` is for those whose uses age.

    Raises:
        InvalidRequestError: an unknown name, or a half-life that is not above 0.
    """
    if name not in POLICIES:
        raise InvalidRequestError(
            f"unknown eviction policy {name!r}; allowed: {', '.join(POLICIES)}", field="policy"
        )
    chosen = POLICIES[name]
    return Lcbfu(half_life_s) if chosen is Lcbfu else chosen()
