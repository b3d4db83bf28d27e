"""What a gateway holds, and its heartbeat to the router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from engine.ports import Clock
from server.remote import CALL_TIMEOUT_S, ReplicaLostError, RouterClient
from server.routing import Grant, LoadTable, Pulse, Refused, Ticket
from server.switched import NOTHING, Switched, heed

_log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
_GATHER_S = 0.05
"""How long the end of a lease may wait for a request to go along with."""
_TOLD_S = 60.0
"""How long the end of a lease is kept for a router that does not answer: by then it is void."""
_REMEMBERED_S = 600.0
"""A worker that was on the router's list so lately may live, though it is on it no more."""


class Ledger:
    """Leases that run, and the router's last word on the whole application.

    A beat goes out every second, and when a lease ends, so that its place is free for the next: at
    once unless it is :attr:`quiet`, and else after a moment, in which the next request may tell it
    in passing. One beat is on its way at a time, so that under load one ends many. Leases that
    ended while no router answers are told to the next one, if it comes soon.

    Args:
        clock: Unix time, in which processes tell each other what operators changed, and when.
        steady: for how old the router's word is; ``clock`` where none is given.
        heard: told of every load table that comes, and when it was asked for.
    """

    def __init__(
        self,
        name: str,
        router: RouterClient,
        clock: Clock,
        *,
        steady: Clock | None = None,
        heard: Callable[[LoadTable, float], None] = lambda _table, _asked_at_s: None,
    ) -> None:
        self.name = name
        self._heard = heard
        self._router = router
        self._clock = clock
        self._steady = steady or clock
        self._running: dict[str, Grant] = {}
        self._ended: dict[str, float] = {}
        """When each ended that the router has not been told of yet."""
        self._due = asyncio.Event()
        self._pressed = asyncio.Event()
        """Set while something of ours is known to wait."""
        self._pressed_at_s = 0.0
        self._on_their_way = 0
        """Beats that are not answered yet."""
        self._beating: asyncio.Task[None] | None = None
        self.switched = NOTHING
        """What operators have changed; the next router is told, should this one die."""
        self.pulse: Pulse | None = None
        self.pulsed_at_s = 0.0
        self._seen_at_s: dict[str, float] = {}
        """When each worker was last on the router's list."""
        self._pulsed = asyncio.Event()

    def start(self) -> None:
        """Begin to beat."""
        self._beating = asyncio.create_task(self._beat_forever())

    async def close(self) -> None:
        """Say what has ended, once more, and stop beating."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            await self.beat()

    def hold(self, grant: Grant) -> None:
        """A lease begins."""
        self._running[grant.ticket.id] = grant
        self._ended.pop(grant.ticket.id, None)

    def end(self, ticket_id: str) -> None:
        """A lease is over."""
        if self._running.pop(ticket_id, None) is not None:
            self.give_up([ticket_id])

    def give_up(self, ticket_ids: Iterable[str]) -> None:
        """Nobody waits for these any more, whether the router has granted them or not."""
        now_s = self._steady.now_s()
        self._ended.update(dict.fromkeys(ticket_ids, now_s))
        self._due.set()

    def press(self) -> None:
        """Something of this gateway has to wait for a place: whatever ends is told at once."""
        self._pressed_at_s = self._steady.now_s()
        self._pressed.set()

    async def enter(self, tickets: Sequence[Ticket]) -> Sequence[Grant | Refused]:
        """Ask the router to let tickets begin at once, and tell it in passing what has ended.

        Raises:
            ReplicaLostError: it is gone, or out of reach, and may have granted them.
        """
        ended = tuple(self._ended)
        news = await self._router.enter(tickets, ended)
        if not self._on_their_way:  # a beat, sent when these still ran, may arrive after this
            self._told(ended)
        return news

    @property
    def quiet(self) -> bool:
        """Whether nothing waits in the router's queue, as far as is known."""
        free = self.pulse is not None and not self.pulse.load.queued
        return free and self.fresh() and not self._pressed.is_set()

    def switch(self, switched: Switched) -> None:
        """An operator has changed something, as this gateway has seen or heard."""
        merged = self.switched.merged(switched, self._clock.now_s())
        self.switched = heed(self.switched, merged)

    async def first_pulse(self) -> Pulse:
        """The router's last word; waits for the first one that knows a worker."""
        while self.pulse is None or not self.pulse.models:
            self._pulsed.clear()
            await self._pulsed.wait()
        return self.pulse

    def fresh(self) -> bool:
        """Whether the router has answered lately."""
        return self.pulse is not None and self._steady.now_s() - self.pulsed_at_s < CALL_TIMEOUT_S

    def workers(self) -> tuple[str, ...]:
        """Names of the workers that report, and of those that did in the last minutes.

        A router that has just started lists those alone that have reported since, and one that a
        gateway has lost rests for a while, alive or not.
        """
        return tuple(self._seen_at_s)

    async def beat(self) -> None:
        """Tell the router, and hear from it, once; what does not arrive is told the next time."""
        self._due.clear()
        asked_at_s = self._steady.now_s()
        since_s = asked_at_s - _TOLD_S
        self._ended = {id_: at_s for id_, at_s in self._ended.items() if at_s >= since_s}
        ended = tuple(self._ended)
        self._on_their_way += 1
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                pulse = await self._router.heartbeat(
                    self.name, tuple(self._running.values()), ended, self.switched
                )
        except (ReplicaLostError, TimeoutError):
            _log.warning("the router does not answer; what runs goes on")
            return
        finally:
            self._on_their_way -= 1
        self._told(ended)
        if not pulse.load.queued and self._pressed_at_s < asked_at_s:
            self._pressed.clear()
        self.pulse, self.pulsed_at_s = pulse, self._steady.now_s()
        self._see(pulse.workers)
        self._heard(pulse.load, asked_at_s)
        self.switch(pulse.switched)
        self._pulsed.set()

    def _told(self, ended: Iterable[str]) -> None:
        for id_ in ended:
            self._ended.pop(id_, None)

    def _see(self, workers: Sequence[str]) -> None:
        since_s = self.pulsed_at_s - _REMEMBERED_S
        kept = {name: at_s for name, at_s in self._seen_at_s.items() if at_s >= since_s}
        self._seen_at_s = {**kept, **dict.fromkeys(workers, self.pulsed_at_s)}

    async def _beat_forever(self) -> None:
        while True:
            await self.beat()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._until_due(), HEARTBEAT_S)

    async def _until_due(self) -> None:
        """Return when a lease has ended that no request has told the router of in passing."""
        while True:
            await self._due.wait()
            if self.quiet:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._pressed.wait(), _GATHER_S)
            if self._ended:
                return
            self._due.clear()
