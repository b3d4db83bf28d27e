"""From the tickets of a request to grants, over routers that may die meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from server.ledger import Ledger
from server.remote import ReplicaLostError, RouterClient
from server.routing import Expired, Grant, Place, Refused, Ticket

_GRACE_S = 2.0
"""How long after a deadline the router's word on it is waited for."""
_PAUSE_S = (0.1, 1.0)
"""Before a router that died is asked again: at first, and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """One request's side of admission.

    Attributes:
        left_s: seconds until the request's deadline.
        watching: whether every change of a ticket's place is to be told, or only the first.
        held: told of each grant as it is heard of, before anything else.
        placed: told where a ticket stands in the queue.
        late: told of each ticket whose deadline passed; it gets no grant.
    """

    router: RouterClient
    ledger: Ledger
    left_s: Callable[[], float]
    watching: bool
    held: Callable[[Grant], None]
    placed: Callable[[Place], Awaitable[None]]
    late: Callable[[Ticket], Awaitable[None]]

    async def of(self, tickets: Sequence[Ticket]) -> AsyncGenerator[Grant, None]:
        """Admit tickets and yield their grants; a router that died is asked again.

        Raises:
            DarkroomError: refused.
        """
        pending = {ticket.id: ticket for ticket in tickets}
        try:
            async with aclosing(self._settle(pending)) as grants:
                async for grant in grants:
                    yield grant
        finally:
            if pending:  # granted or not: an answer may have been lost
                self.ledger.give_up(pending)

    async def _settle(self, pending: dict[str, Ticket]) -> AsyncGenerator[Grant, None]:
        """Yield grants until nothing is pending, or it is late for what is."""
        first_pause_s, longest_pause_s = _PAUSE_S
        pause_s = first_pause_s
        while pending and self.left_s() > -_GRACE_S:
            try:
                async with (
                    asyncio.timeout(self.left_s() + _GRACE_S),
                    aclosing(self._admit(pending)) as grants,
                ):
                    async for grant in grants:
                        pause_s = first_pause_s
                        yield grant
            except ReplicaLostError:
                await asyncio.sleep(pause_s)
                pause_s = min(2.0 * pause_s, longest_pause_s)
            except TimeoutError:
                break
        for ticket in pending.values():
            await self.late(ticket)

    async def _admit(self, pending: dict[str, Ticket]) -> AsyncGenerator[Grant, None]:
        """One admission; takes out of ``pending`` what was settled.

        Where nobody is known to wait it begins with a question that a single reply answers, and a
        stream is opened for what has to wait after all: under little load that spares both sides
        most of the work, and under much the question would be one more.
        """
        if self.ledger.quiet:
            for grant in await self._enter(pending):
                yield grant
            if not pending:
                return
        self.ledger.press()
        async with aclosing(self.router.admit(tuple(pending.values()), self.watching)) as stream:
            async for news in stream:
                match news:
                    case Refused():
                        pending.clear()
                        raise news.error
                    case Grant():
                        del pending[news.ticket.id]
                        self.held(news)
                        yield news
                    case Expired():
                        await self.late(pending.pop(news.ticket_id))
                    case Place():
                        await self.placed(news)
                _resume(pending)

    async def _enter(self, pending: dict[str, Ticket]) -> list[Grant]:
        """The grants of those that begin at once, all of them held.

        A request of which nothing began has not been admitted: it is judged anew, when what came
        in the same moment is in the queue too.
        """
        grants = []
        for news in await self.ledger.enter(tuple(pending.values())):
            if isinstance(news, Refused):
                pending.clear()
                raise news.error
            del pending[news.ticket.id]
            self.held(news)
            grants.append(news)
        if grants:
            _resume(pending)
        return grants


def _resume(pending: dict[str, Ticket]) -> None:
    """Admitted once: a second time, neither bound nor deadline stands in the way."""
    pending.update({i: replace(t, resumed=True) for i, t in pending.items()})
