"""Time that a test moves by hand."""

from __future__ import annotations


class FakeClock:
    """Time that moves only by :meth:`tick`."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        return self.time_s

    def tick(self, seconds: float) -> None:
        self.time_s += seconds
