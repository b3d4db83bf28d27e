"""What the noise cache was worth: counts for metrics, under one lock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from engine.types import Reuse, ReuseOutcome

JUMP_BINS = 10
"""Hits by share of the steps skipped, in tenths."""
SIMILARITY_BINS = 20
"""Looks by similarity of the closest entry, in twentieths; what is under 0 counts in the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseStatistics:
    """Counts since the engine began.

    Attributes:
        outcomes: requests by what became of their visit.
        hits_by_jump: hits by tenth of the steps skipped.
        looks_by_similarity: approximate looks by twentieth of the closest entry's similarity.
        steps_asked: evaluations of all requests' whole tables.
        steps_saved: those that hits were spared.
        offers_stored, offers_refused, offers_dropped: by the cache, and by the full queue.
        write_s: seconds that the writer has spent in the cache.
    """

    outcomes: Mapping[ReuseOutcome, int]
    hits_by_jump: tuple[int, ...]
    looks_by_similarity: tuple[int, ...]
    steps_asked: int
    steps_saved: int
    offers_stored: int
    offers_refused: int
    offers_dropped: int
    write_s: float


class ReuseCounts:
    """The counters behind :class:`ReuseStatistics`. Safe from any thread."""

    def __init__(self) -> None:
        self._outcomes: Counter[ReuseOutcome] = Counter()
        self._jumps = [0] * JUMP_BINS
        self._similarities = [0] * SIMILARITY_BINS
        self._steps_asked = self._steps_saved = 0
        self._stored = self._refused = self._dropped = 0
        self._write_s = 0.0
        self._lock = threading.Lock()

    def visited(self, reuse: Reuse, steps: int) -> None:
        """A request of a table of ``steps`` evaluations has looked, or has not."""
        with self._lock:
            self._outcomes[reuse.outcome] += 1
            self._steps_asked += steps
            if reuse.outcome is ReuseOutcome.HIT:
                self._steps_saved += reuse.steps_skipped
                self._jumps[_bin(reuse.steps_skipped / steps, JUMP_BINS)] += 1

    def compared(self, similarity: float | None) -> None:
        """The closest entry was this similar; None where there was none."""
        if similarity is not None:
            with self._lock:
                self._similarities[_bin(similarity, SIMILARITY_BINS)] += 1

    def written(self, stored: bool, seconds: float) -> None:
        """The cache has taken an offer, or refused it."""
        with self._lock:
            self._stored += stored
            self._refused += not stored
            self._write_s += seconds

    def dropped(self) -> None:
        """An offer found the writer's queue full."""
        with self._lock:
            self._dropped += 1

    def statistics(self) -> ReuseStatistics:
        """The counts at this moment."""
        with self._lock:
            return ReuseStatistics(
                outcomes=dict(self._outcomes),
                hits_by_jump=tuple(self._jumps),
                looks_by_similarity=tuple(self._similarities),
                steps_asked=self._steps_asked,
                steps_saved=self._steps_saved,
                offers_stored=self._stored,
                offers_refused=self._refused,
                offers_dropped=self._dropped,
                write_s=self._write_s,
            )


def _bin(share: float, bins: int) -> int:
    return min(bins - 1, max(0, int(share * bins)))
