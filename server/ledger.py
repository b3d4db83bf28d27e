"""What a gateway holds, and its heartbeat to the router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from engine.ports import Clock
from server.remote import CALL_TIMEOUT_S, ReplicaLostError, RouterClient
from server.routing import Grant, LoadTable, Pulse
from server.switched import NOTHING, Switched, heed

_log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
_REMEMBERED_S = 600.0
"""A worker that was on the router's list so lately may live, though it is on it no more."""


class Ledger:
    """Leases that run, and the router's last word on the whole application.

    A beat goes out every second, and at once when a lease ends, so that its place is free for the
    next; one call is on its way at a time, so that under load one beat ends many. Leases that ended
    while no router answers are told to the next one.

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
        self._ended: set[str] = set()
        self._due = asyncio.Event()
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
        self._ended.discard(grant.ticket.id)

    def end(self, ticket_id: str) -> None:
        """A lease is over."""
        if self._running.pop(ticket_id, None) is not None:
            self._ended.add(ticket_id)
            self._due.set()

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
        ended = tuple(self._ended)
        asked_at_s = self._steady.now_s()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                pulse = await self._router.heartbeat(
                    self.name, tuple(self._running.values()), ended, self.switched
                )
        except (ReplicaLostError, TimeoutError):
            _log.warning("the router does not answer; what runs goes on")
            return
        self._ended.difference_update(ended)
        self.pulse, self.pulsed_at_s = pulse, self._steady.now_s()
        self._see(pulse.workers)
        self._heard(pulse.load, asked_at_s)
        self.switch(pulse.switched)
        self._pulsed.set()

    def _see(self, workers: Sequence[str]) -> None:
        since_s = self.pulsed_at_s - _REMEMBERED_S
        kept = {name: at_s for name, at_s in self._seen_at_s.items() if at_s >= since_s}
        self._seen_at_s = {**kept, **dict.fromkeys(workers, self.pulsed_at_s)}

    async def _beat_forever(self) -> None:
        while True:
            await self.beat()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), HEARTBEAT_S)
