"""Refusals that need no second asking: under a flood they are decided where the request came in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import OverloadedError
from engine.ports import Clock
from server.routing import Ticket

HOLDS_S = 1.0
"""How long a refusal is believed at most, however long the router said to wait."""
_SAME_S = 0.05
"""Deadlines are set when a request arrives and looked at when its tickets are made: by less than
this much two requests do not differ in patience."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    steps: float
    priority: int
    patience_s: float
    until_s: float
    retry_at_s: float


class Refusals:
    """The router's last refusal of each tenant.

    A request that asks for no less, at no higher priority, and came with no more time than one that
    was refused a moment ago is refused likewise. Bounded by the tenants of the configuration.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: dict[str, _Refusal] = {}

    def note(self, tickets: Sequence[Ticket], error: OverloadedError) -> None:
        """The router has just refused these tickets of one request."""
        now_s = self._clock.now_s()
        wait_s = HOLDS_S if error.retry_after_s is None else error.retry_after_s
        asked = _asked(tickets)
        until_s = now_s + min(wait_s, HOLDS_S)
        self._last[tickets[0].tenant] = _Refusal(*asked, until_s=until_s, retry_at_s=now_s + wait_s)

    def check(self, tickets: Sequence[Ticket]) -> None:
        """Refuse what would be refused.

        Raises:
            OverloadedError: with what is left of the time that the router named.
        """
        last = self._last.get(tickets[0].tenant)
        if last is None:
            return
        now_s = self._clock.now_s()
        if now_s >= last.until_s:
            del self._last[tickets[0].tenant]
            return
        steps, priority, patience_s = _asked(tickets)
        if (
            steps >= last.steps
            and priority <= last.priority
            and patience_s <= last.patience_s + _SAME_S
        ):
            raise OverloadedError(
                "too much is waiting already; try again later",
                retry_after_s=max(0.0, last.retry_at_s - now_s),
            )


def _asked(tickets: Sequence[Ticket]) -> tuple[float, int, float]:
    """(steps of all, highest priority, seconds from arrival to the earliest deadline)."""
    return (
        sum(ticket.steps for ticket in tickets),
        max(ticket.priority for ticket in tickets),
        min(
            math.inf if t.deadline_at_s is None else t.deadline_at_s - t.arrived_at_s
            for t in tickets
        ),
    )
