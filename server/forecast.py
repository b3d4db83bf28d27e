"""When what waits will begin and be done, as far as the measured rates tell.

The estimate is of work: whatever goes before a ticket, running or waiting, is done first, by the
workers that have its model open and at what they do at saturation. Work on models that share no
worker with it is not in its way. What nobody has measured counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from server.fleet import Fleet, Held
from server.routing import Ticket, Wait


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is before a ticket, in seconds of work.

    Attributes:
        wait_s: before its request: the request's own other tickets do not count.
        queued: whether some of that waits too; if not, the ticket is the next in line.
        done_s: with itself and its request's tickets before it.
    """

    wait_s: float
    queued: bool
    done_s: float


class Forecast:
    """An estimate for one moment.

    Args:
        held: everything at work.
        order: gives everything that waits, in fair order.
    """

    def __init__(
        self, fleet: Fleet, held: Iterable[Held], order: Callable[[], Iterable[Ticket]]
    ) -> None:
        self._fleet = fleet
        self._held = tuple(held)
        self._order = order
        self._rates: dict[str, float] = {}
        self._openers: dict[str, frozenset[str]] = {}

    def of(self, tickets: Sequence[Ticket]) -> Iterator[tuple[Ticket, Outlook]]:
        """The outlook of each ticket of a request that waits; of the first to begin first."""
        own = {ticket.id for ticket in tickets}
        before_s = {ticket.model: self._running_s(ticket.model) for ticket in tickets}
        own_s = dict.fromkeys(before_s, 0.0)
        queued: set[str] = set()
        for ticket in self._order():
            if ticket.id not in own:
                for model in before_s:
                    if self._compete(ticket.model, model):
                        before_s[model] += self.seconds(ticket.model, ticket.steps)
                        queued.add(model)
                continue
            model = ticket.model
            own_s[model] += self.seconds(model, ticket.steps)
            wait_s = before_s[model]
            yield ticket, Outlook(wait_s, model in queued, wait_s + own_s[model])
            own.remove(ticket.id)
            if not own:
                return

    def waits(self) -> dict[tuple[str, str], tuple[Wait, ...]]:
        """What is before a request that comes now, by model and tenant: ``LoadTable.waits``."""
        order = tuple(self._order())
        so_far_s = {model: self._running_s(model) for model in {it.model for it in order}}
        running_s = dict(so_far_s)
        found: dict[tuple[str, str], dict[int, float]] = {}
        for ticket in order:
            for model in so_far_s:
                if self._compete(ticket.model, model):
                    so_far_s[model] += self.seconds(ticket.model, ticket.steps)
                    row = found.setdefault((model, ticket.tenant), {})
                    row[ticket.priority] = so_far_s[model]
        return {
            (model, tenant): _levels(row, running_s[model])
            for (model, tenant), row in found.items()
            if self._rate(model)
        }

    def rates(self) -> dict[str, float]:
        """Steps a second of each model that :meth:`waits` or :meth:`of` met."""
        return {model: rate for model, rate in self._rates.items() if rate}

    def all_s(self, *, without: Collection[str]) -> float:
        """Until everything is done, less the waiting tickets of these ids."""
        waiting = (it for it in self._order() if it.id not in without)
        return sum(
            self.seconds(model, steps)
            for model, steps in (
                *((ticket.model, steps_left) for _, ticket, steps_left in self._held),
                *((ticket.model, ticket.steps) for ticket in waiting),
            )
        )

    def seconds(self, model: str, steps: float) -> float:
        """How long the workers that have ``model`` open need for ``steps``."""
        rate = self._rate(model)
        return steps / rate if rate else 0.0

    def _rate(self, model: str) -> float:
        if model not in self._rates:
            self._rates[model] = self._fleet.steps_per_s(model)
        return self._rates[model]

    def _running_s(self, model: str) -> float:
        return sum(
            self.seconds(ticket.model, steps_left)
            for worker, ticket, steps_left in self._held
            if not self._open_on(model) or worker in self._open_on(model)
        )

    def _compete(self, one: str, other: str) -> bool:
        """Whether a worker may have to do both; a model that is open nowhere goes to any."""
        if one == other:
            return True
        of_one, of_other = self._open_on(one), self._open_on(other)
        return not of_one or not of_other or bool(of_one & of_other)

    def _open_on(self, model: str) -> frozenset[str]:
        if model not in self._openers:
            self._openers[model] = self._fleet.openers(model)
        return self._openers[model]


def _levels(row: dict[int, float], running_s: float) -> tuple[Wait, ...]:
    """By priority, the lowest first: what is before whoever goes behind all of no lower one."""
    levels = []
    wait_s = 0.0
    for priority in sorted(row, reverse=True):
        wait_s = max(wait_s, row[priority])
        levels.append(Wait(priority, seconds=wait_s, queued_s=wait_s - running_s))
    return tuple(reversed(levels))
