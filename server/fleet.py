"""The workers as the router sees them: what each has, what each holds, and which is next.

A worker holds ``depth`` saturation batches, enough for its step loop to mix and to lose a member
without a hole. Of the workers that serve the model, each with what is configured and what was added
since, those with room; among these one that has it open, then the one that is free soonest. A
worker opens a model that others have open only when nothing waits for those that it has itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from engine.ports import Clock
from server.routing import Rate, Ticket, WorkerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """Dials that no operator needs to turn."""

    depth: float = 2.0
    """Saturation batches on a worker from which on it gets no further ticket."""
    max_live: int = 256
    """Tickets on a worker at most, however narrow."""
    lease_s: float = 15.0
    """A lease that its gateway has not renewed for so long is void."""
    report_s: float = 5.0
    """A worker that has not reported for so long gets nothing new."""


Held: TypeAlias = tuple[str, Ticket, float]
"""(worker, ticket, steps left) of something at work."""


@dataclass(slots=True)
class Holding:
    """What a worker holds by the router's own count; reports are a moment old."""

    report: WorkerReport
    tickets: int = 0
    batches: float = 0.0
    busy_s: float = 0.0

    def add(self, ticket: Ticket, steps_left: float) -> None:
        """Count a ticket that it holds."""
        rate = self.report.rates.get(ticket.model) or next(iter(self.report.rates.values()), None)
        self.tickets += 1
        if rate is None:  # nothing measured yet: one ticket fills it
            self.batches = math.inf
        else:
            self.batches += ticket.width / rate.saturation_steps
            self.busy_s += steps_left / rate.steps_per_s


@dataclass(slots=True)
class _Worker:
    report: WorkerReport
    heard_at_s: float


class Fleet:
    """The workers that report, and how fast they are."""

    def __init__(self, policy: AdmissionPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._workers: dict[str, _Worker] = {}
        self._lost: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def heard(self, report: WorkerReport) -> None:
        """Note a report; one that was lost rests for a while before it counts again."""
        now_s = self._clock.now_s()
        if now_s - self._lost.get(report.id, -math.inf) > self._policy.lease_s:
            self._workers[report.id] = _Worker(report, now_s)

    def lose(self, worker: str) -> bool:
        """A gateway cannot reach a worker: for a while it gets no more. Whether this is news."""
        self._lost[worker] = self._clock.now_s()
        return self._workers.pop(worker, None) is not None

    def sweep(self) -> None:
        """Forget workers that have fallen silent."""
        since_s = self._clock.now_s() - self._policy.lease_s
        self._workers = {i: w for i, w in self._workers.items() if w.heard_at_s >= since_s}
        self._lost = {i: at_s for i, at_s in self._lost.items() if at_s >= since_s}

    def reports(self) -> tuple[WorkerReport, ...]:
        """The last one of each worker."""
        return tuple(worker.report for worker in self._workers.values())

    def rates(self, model: str | None = None) -> list[Rate]:
        """What each worker does of ``model``, or of its first where nobody has measured that."""
        reports = self.reports()
        known = [rate for report in reports if (rate := report.rates.get(model or ""))]
        return known or [next(iter(report.rates.values())) for report in reports if report.rates]

    def steps_per_s(self, model: str | None = None) -> float:
        """What those workers together do at saturation; 0 while nothing is measured."""
        return sum(rate.steps_per_s for rate in self.rates(model))

    def tick_s(self, model: str) -> float:
        """Of the quickest of them, with one guided picture; 0 while nothing is measured."""
        return min((rate.tick_s for rate in self.rates(model)), default=0.0)

    def openers(self, model: str) -> frozenset[str]:
        """The workers that have ``model`` open."""
        return frozenset(report.id for report in self.reports() if model in report.rates)

    def open_to(self, held: Iterable[Held]) -> list[Holding]:
        """The workers that may get work.

        Args:
            held: everything at work.
        """
        since_s = self._clock.now_s() - self._policy.report_s
        holdings = {
            id_: Holding(worker.report)
            for id_, worker in self._workers.items()
            if worker.heard_at_s >= since_s
        }
        for worker, ticket, steps_left in held:
            if (holding := holdings.get(worker)) is not None:
                holding.add(ticket, steps_left)
        return list(holdings.values())

    def place(
        self, model: str, holdings: Iterable[Holding], wanted: Collection[str]
    ) -> Holding | None:
        """The worker for the next ticket of ``model``, or None while it has to wait.

        Args:
            wanted: every model that something waits for.
        """
        holdings = [it for it in holdings if any(i.id == model for i in it.report.models)]
        have = [holding for holding in holdings if model in holding.report.rates]
        room = [
            holding
            for holding in holdings
            if holding.batches < self._policy.depth and holding.tickets < self._policy.max_live
        ]
        near = [holding for holding in room if holding in have]
        if not near and have:
            near = [h for h in room if not any(name in wanted for name in h.report.rates)]
        return min(near if have else room, key=lambda holding: holding.busy_s, default=None)
