"""The time of day, which processes share: deadlines and arrivals travel in it."""

from __future__ import annotations

import time


class UnixClock:
    """Implements :class:`engine.ports.Clock` on the wall clock."""

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()
