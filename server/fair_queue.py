"""The order in which tickets go: fair between tenants, first come first served inside one.

*Between tenants* start-time fair queueing (Goyal, Vin and Cheng, 1996): a tenant's virtual time
advances by steps / weight with each of its tickets that starts, and the tenant that is furthest
behind goes next. One that comes back after a pause starts level with the others: it has neither
saved up service nor lost any.

*Inside a tenant* by arrival, where a level of priority counts as ``aging_s`` seconds of waiting.
The order of two tickets so never changes while they wait, and nothing starves.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator, Mapping

from server.routing import Ticket

_Entry = tuple[float, int, Ticket]
"""(sort key inside its tenant, number of arrival, ticket)."""


class FairQueue:
    """Tickets that wait, by id. ``weights`` are of tenants; one that is not named weighs 1."""

    def __init__(self, weights: Mapping[str, float], aging_s: float) -> None:
        self._weights = weights
        self._aging_s = aging_s
        self._entries: dict[str, _Entry] = {}
        self._tenants: dict[str, list[_Entry]] = {}
        self._arrivals = itertools.count()
        self._start_tags: dict[str, float] = {}
        """Virtual time at which each tenant's next ticket starts."""
        self._now = 0.0
        """Virtual time of the last start."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ticket_id: object) -> bool:
        return ticket_id in self._entries

    def __iter__(self) -> Iterator[Ticket]:
        """In the order in which they arrived here."""
        return (ticket for _, _, ticket in tuple(self._entries.values()))

    def push(self, ticket: Ticket) -> None:
        """Let ``ticket`` wait; one of the same id is replaced."""
        self.remove(ticket.id)
        if ticket.tenant not in self._tenants:
            tag = self._start_tags.get(ticket.tenant, 0.0)
            self._start_tags[ticket.tenant] = max(tag, self._now)
        key = ticket.arrived_at_s - ticket.priority * self._aging_s
        entry = self._entries[ticket.id] = (key, next(self._arrivals), ticket)
        bisect.insort(self._tenants.setdefault(ticket.tenant, []), entry, key=_order)

    def remove(self, ticket_id: str) -> bool:
        """Take a ticket out, whether it was in or not; it is not charged."""
        entry = self._entries.pop(ticket_id, None)
        if entry is None:
            return False
        tenant = entry[2].tenant
        waiting = self._tenants[tenant]
        del waiting[bisect.bisect_left(waiting, _order(entry), key=_order)]
        if not waiting:
            del self._tenants[tenant]
        return True

    def start(self, ticket: Ticket) -> None:
        """Take a waiting ticket out because it starts now, at its tenant's expense."""
        self.remove(ticket.id)
        self._now = max(self._now, self._start_tags[ticket.tenant])
        self._start_tags[ticket.tenant] += ticket.steps / self._weight(ticket.tenant)

    def in_order(self) -> Iterator[Ticket]:
        """Everything that waits, in the order in which one unlimited worker would get it.

        A snapshot: the queue may change while it is read.
        """
        tenants = {tenant: tuple(waiting) for tenant, waiting in self._tenants.items()}
        heads = [(self._start_tags[tenant], tenant, 0) for tenant in tenants]
        heapq.heapify(heads)
        while heads:
            tag, tenant, i = heapq.heappop(heads)
            ticket = tenants[tenant][i][2]
            yield ticket
            if i + 1 < len(tenants[tenant]):
                heapq.heappush(heads, (tag + ticket.steps / self._weight(tenant), tenant, i + 1))

    def steps(self, tenant: str | None = None) -> float:
        """Steps that wait, of one tenant or in all."""
        entries = self._entries.values() if tenant is None else self._tenants.get(tenant, ())
        return sum(ticket.steps for _, _, ticket in entries)

    def tenants(self) -> dict[str, float]:
        """Steps that wait, of each tenant that has some."""
        return {tenant: self.steps(tenant) for tenant in self._tenants}

    def requests(self) -> int:
        """Requests that have something waiting."""
        return len({ticket.request_id for _, _, ticket in self._entries.values()})

    def forgive(self) -> None:
        """Let all tenants start level: for a moment in which the application is idle."""
        if not self._entries:
            self._start_tags.clear()
            self._now = 0.0

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


def _order(entry: _Entry) -> tuple[float, int]:
    return entry[:2]
