"""Refusals that need no asking: under a flood they are decided where the request came in.

A gateway goes by two things that the router has said, and the newer word counts:

- *The load table* of the last pulse, with what has happened since as far as this gateway knows:
  what it sent and what left the queue of its own. Of everything else it takes for gone whatever
  the workers could have done since: it may ask in vain, but it refuses nothing that would clearly
  be taken.
- *The last refusal* of the like: who asks no less, with no more patience and no higher priority,
  gets the same answer for a moment. It covers what no table tells, such as deadlines, and what
  other gateways have sent since the table.

What was admitted before (``resumed``) is never refused.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from engine.errors import LimitExceededError
from engine.ports import Clock
from server.bounds import Queued, check_room, check_size, check_wait
from server.config import AdmissionConfig
from server.errors import Bound, NoRoomError, refusal_reason
from server.routing import LoadTable, Ticket

BELIEVED_S = 3.0
"""How old a table may be; a router that lives sends one every second."""
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
    spared: float
    noted_at_s: float
    until_s: float
    retry_at_s: float
    patient: bool
    bound: Bound


@dataclass(frozen=True, slots=True)
class _Left:
    """A ticket of ours that left the queue at ``at_s``; perhaps the table holds it (``told``)."""

    at_s: float
    ticket: Ticket
    granted: bool
    told: bool


class Refusals:
    """What one gateway refuses by itself. Belongs to one event loop.

    Bounded by the tickets that this gateway has in the router's queue, and by the tenants and
    models of the configuration.

    Args:
        clock: must never go back: ages are told by it, and no times of other processes.
        refused: told the reason of each refusal that was decided here.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        clock: Clock,
        *,
        refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._refused = refused
        self._table: LoadTable | None = None
        self._asked_at_s = -math.inf
        self._waiting: dict[str, Ticket] = {}
        """Ours, in the router's queue or on their way there."""
        self._since: dict[str, Ticket] = {}
        """Of those, what was sent after the table had come: certainly not in it."""
        self._left: deque[_Left] = deque()
        self._last: dict[tuple[str, frozenset[str]], _Refusal] = {}
        """The last refusal by tenant and models."""

    # ------------------------------------------------------------------ what is heard

    def heard(self, table: LoadTable, asked_at_s: float) -> None:
        """The router has sent a table, in answer to a question of ``asked_at_s``."""
        if asked_at_s < self._asked_at_s:
            return  # overtaken on its way
        self._table, self._asked_at_s = table, asked_at_s
        self._since.clear()
        recent = (it for it in self._left if it.at_s >= asked_at_s)
        self._left = deque(replace(it, told=True) for it in recent)

    def note(self, tickets: Sequence[Ticket], error: NoRoomError) -> None:
        """The router has just refused these tickets of one request: they never waited."""
        for ticket in tickets:
            self._waiting.pop(ticket.id, None)
            self._since.pop(ticket.id, None)
        now_s = self._clock.now_s()
        wait_s = HOLDS_S if error.retry_after_s is None else error.retry_after_s
        self._last[_whose(tickets)] = _Refusal(
            *_asked(tickets),
            noted_at_s=now_s,
            until_s=now_s + min(wait_s, HOLDS_S),
            retry_at_s=now_s + wait_s,
            patient=_patient(tickets),
            bound=error.bound,
        )

    def granted(self, ticket: Ticket) -> None:
        """It waits no longer: its turn has come."""
        self._leave([ticket], granted=True)

    def gave_up(self, tickets: Iterable[Ticket]) -> None:
        """None of these waits any longer; those that were granted are none of them."""
        self._leave(tickets, granted=False)

    def _leave(self, tickets: Iterable[Ticket], *, granted: bool) -> None:
        now_s = self._clock.now_s()
        for ticket in tickets:
            if self._waiting.pop(ticket.id, None) is not None:
                told = self._since.pop(ticket.id, None) is None
                self._left.append(_Left(now_s, ticket, granted, told))
        while self._left and now_s - self._left[0].at_s > BELIEVED_S:
            self._left.popleft()  # by any table that is still believed, it was gone already

    # ------------------------------------------------------------------ what is decided

    def pass_on(self, tickets: Sequence[Ticket]) -> None:
        """Refuse what would be refused, and count the rest as on its way to the router.

        Raises:
            NoRoomError: with the seconds until the router should take it.
            LimitExceededError: the request is larger than the whole queue.
        """
        fresh = [ticket for ticket in tickets if not ticket.resumed]
        if fresh:
            try:
                check_size(fresh, self._config)
                self._check_table(fresh)
                self._check_last(fresh)
            except (LimitExceededError, NoRoomError) as error:
                self._refused(refusal_reason(error))
                raise
        for ticket in fresh:
            self._waiting[ticket.id] = self._since[ticket.id] = ticket

    def _check_table(self, tickets: Sequence[Ticket]) -> None:
        if self._table is None or self._age_s() > BELIEVED_S:
            return
        check_room(tickets, self._queued(self._table, tickets[0].tenant), self._config)
        self._check_wait(tickets, self._table)

    def _queued(self, table: LoadTable, tenant: str) -> Queued:
        """What waits at least."""
        done = table.steps_per_s * self._age_s()
        gone = [it.ticket for it in self._left if it.told]
        part_left = max(0.0, 1.0 - done / table.queued_steps) if table.queued_steps > 0 else 0.0

        def steps(in_table: float, new: Iterable[Ticket], old: Iterable[Ticket]) -> float:
            return max(0.0, in_table - done - _steps(old)) + _steps(new)

        requests = table.requests * part_left - _requests(gone)
        return Queued(
            steps=steps(table.queued_steps, self._since.values(), gone),
            tenant_steps=steps(
                table.tenants.get(tenant, 0.0),
                (ticket for ticket in self._since.values() if ticket.tenant == tenant),
                (ticket for ticket in gone if ticket.tenant == tenant),
            ),
            requests=max(0.0, requests) + _requests(self._since.values()),
            steps_per_s=table.steps_per_s,
        )

    def _check_wait(self, tickets: Sequence[Ticket], table: LoadTable) -> None:
        """Hold a request against the work that is at least before it."""
        tenant, models = _whose(tickets)
        [model, *others] = models
        levels = table.waits.get((model, tenant), ())
        priority = max(ticket.priority for ticket in tickets)
        told = next((level for level in levels if level.priority >= priority), None)
        gone = [it for it in self._left if it.told]
        moved = any(it.ticket.tenant == tenant and not it.granted for it in gone)
        if others or told is None or moved:
            return  # who gives up lets all of his tenant move ahead of others
        rate = table.rates[model]
        drained_s = self._age_s() + sum(
            it.ticket.steps / table.rates.get(it.ticket.model, rate) for it in gone
        )
        new = (it for it in self._since.values() if (it.tenant, it.model) == (tenant, model))
        new_s = _steps(ticket for ticket in new if ticket.priority >= priority) / rate
        if max(0.0, told.queued_s - drained_s) + new_s == 0.0:
            return  # it may well be the next in line
        check_wait(
            tickets,
            wait_s=max(0.0, told.seconds - drained_s) + new_s,
            spared_s=_spared(tickets) / rate,
            config=self._config,
        )

    def _check_last(self, tickets: Sequence[Ticket]) -> None:
        whose = _whose(tickets)
        last = self._last.get(whose)
        if last is None:
            return
        now_s = self._clock.now_s()
        told_since = self._table is not None and self._asked_at_s > last.noted_at_s
        if now_s >= last.until_s or (told_since and last.bound != "deadline"):
            del self._last[whose]
            return
        steps, priority, patience_s, spared = _asked(tickets)
        if (
            steps >= last.steps
            and priority <= last.priority
            and patience_s <= last.patience_s + _SAME_S
            and spared <= last.spared
            and _patient(tickets) <= last.patient
        ):
            raise NoRoomError(
                "too much is waiting already; try again later",
                bound=last.bound,
                retry_after_s=max(0.0, last.retry_at_s - now_s),
            )

    def _age_s(self) -> float:
        """Seconds since the table was asked for: it is younger than that."""
        return self._clock.now_s() - self._asked_at_s


def _steps(tickets: Iterable[Ticket]) -> float:
    return sum(ticket.steps for ticket in tickets)


def _requests(tickets: Iterable[Ticket]) -> int:
    return len({ticket.request_id for ticket in tickets})


def _whose(tickets: Sequence[Ticket]) -> tuple[str, frozenset[str]]:
    return tickets[0].tenant, frozenset(ticket.model for ticket in tickets)


def _spared(tickets: Iterable[Ticket]) -> float:
    return sum(ticket.spared_steps for ticket in tickets)


def _patient(tickets: Iterable[Ticket]) -> bool:
    return all(ticket.patient for ticket in tickets)


def _asked(tickets: Sequence[Ticket]) -> tuple[float, int, float, float]:
    """(steps of all, highest priority, seconds from arrival to the earliest deadline, spared).

    Who spares more by degrading may wait longer than who was refused.
    """
    return (
        _steps(tickets),
        max(ticket.priority for ticket in tickets),
        min(
            math.inf if t.deadline_at_s is None else t.deadline_at_s - t.arrived_at_s
            for t in tickets
        ),
        _spared(tickets),
    )
