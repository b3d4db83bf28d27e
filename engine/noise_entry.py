"""Where a trajectory may enter from a stored state: levels against the rows of its own table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.ports import Candidate, ReuseProfile, StateKind, Wish
from engine.types import CacheDirective

SAME_LEVEL = 1e-6
"""As :mod:`engine.solvers` tells levels apart."""


@dataclass(frozen=True, slots=True)
class Way:
    """One state that would serve, and the level at which a trajectory would enter from it."""

    wish: Wish
    similarity: float
    log_snr: float


def ways_in(
    candidates: Sequence[Candidate],
    levels: npt.NDArray[np.float64],
    profile: ReuseProfile,
    directive: CacheDirective,
) -> list[Way]:
    """States that the request may start from, the one that saves most first.

    A ``NOISY`` state enters at its own level and no other. A ``CLEAN`` one enters at the level of
    the last row that similarity allows, or at its own where that is noisier.

    Args:
        levels: log-SNR at each row of the request's whole table, and after the last.
    """
    steps = len(levels) - 1
    ways = []
    for candidate in candidates:
        if candidate.similarity < directive.min_similarity:
            continue
        share = min(profile.jumps.share(candidate.similarity), directive.max_jump)
        most = int(share * steps + 1e-9)
        for state in candidate.states:
            if state.kind is not profile.kind:
                continue
            if state.kind is StateKind.NOISY:
                row, level = _rows_skipped(levels, state.log_snr), state.log_snr
                if level >= float(levels[-1]) - SAME_LEVEL:
                    continue
            else:
                row = min(most, _rows_skipped(levels, state.log_snr))
                while row > 0 and _rows_skipped(levels, float(levels[row])) > most:
                    row -= 1  # between the two evaluations of one step
                level = float(levels[row])
                row = _rows_skipped(levels, level)
            if 1 <= row <= most:
                ways.append(Way(Wish(state.id, row), candidate.similarity, level))
    return sorted(ways, key=lambda way: (-way.wish.steps_saved, -way.similarity))


def _rows_skipped(levels: npt.NDArray[np.float64], log_snr: float) -> int:
    """Evaluations that a table which begins at a level has fewer than the whole one.

    Rows at or under the level are passed over but one: the last of them, or the one that enters
    between two levels, is the new table's first.
    """
    return int(np.searchsorted(levels[:-1], log_snr + SAME_LEVEL, side="right")) - 1


def row_of(share: float, levels: npt.NDArray[np.float64]) -> int:
    """The last row at which no more than a share is done, but one; never inside of a step."""
    steps = len(levels) - 1
    row = min(steps, max(1, int(share * steps + 1e-9)))
    while 1 < row < steps and levels[row + 1] - levels[row] <= SAME_LEVEL:
        row -= 1
    while row < steps and levels[row + 1] - levels[row] <= SAME_LEVEL:
        row += 1
    return row
