"""The router: one process that decides who runs where, and carries nothing.

A request's tickets come in as one call, which is answered at once where workers are free for them;
else grants go out on a stream as workers come free.
Pictures and prompts never pass here. What it knows is gone when it dies; the next one hears of
every running task within a second or two, from workers' reports and gateways' heartbeats; so it
does of the models that an operator has added since the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence

from engine.errors import DarkroomError, InvalidRequestError
from engine.ports import Clock
from server.admission import Admission
from server.clock import UnixClock
from server.config import ServeConfig
from server.errors import refusal_reason
from server.fleet import AdmissionPolicy
from server.messages import ModelInfo
from server.router_metrics import RouterMetrics
from server.routing import (
    Expired,
    Grant,
    Place,
    Pulse,
    Refused,
    ReportReply,
    RouterNews,
    Ticket,
    WorkerReport,
)
from server.switched import NOTHING, Switched, heed

_log = logging.getLogger(__name__)

TICK_S = 1.0
"""Between two looks at deadlines and silence, and between two places that a client is told."""


class _Stream:
    """What one request has yet to hear. Bounded: a ticket's newer news replaces its older."""

    def __init__(self, tickets: Sequence[Ticket], *, watching: bool) -> None:
        self.waiting = {ticket.id for ticket in tickets}
        self.watching = watching
        self.news: dict[str, RouterNews] = {}
        self.places: dict[str, tuple[int, int]] = {}
        self.woken = asyncio.Event()

    def tell(self, ticket_id: str, news: RouterNews) -> None:
        """The last news of a ticket: it waits no longer."""
        self.drop(ticket_id)
        self.news[ticket_id] = news

    def tell_place(self, ticket_id: str, place: tuple[int, int]) -> None:
        """Where it stands, if that is new."""
        if self.places.get(ticket_id) != place:
            self.places[ticket_id] = place
            self.news[ticket_id] = Place(ticket_id, *place)
            self.woken.set()

    def drop(self, ticket_id: str) -> None:
        """A ticket waits no longer, and there is nothing to say about it."""
        self.waiting.discard(ticket_id)
        self.woken.set()


class Router:
    """Admission behind asyncio. All methods belong to one event loop."""

    def __init__(self, config: ServeConfig, *, clock: Clock | None = None) -> None:
        self._clock = clock or UnixClock()
        self._admission = Admission(
            config.admission,
            weights={tenant.id: tenant.weight for tenant in config.auth.tenants},
            clock=self._clock,
            policy=AdmissionPolicy(max_live=config.workers.max_live),
        )
        self._metrics = RouterMetrics()
        self._streams: dict[str, _Stream] = {}
        """By ticket, of those that wait."""
        self._configured = tuple(model.id for model in config.models)
        self._known: dict[str, ModelInfo] = {}
        """What workers last said of each model that is published."""
        self._switched = NOTHING
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look at deadlines and silence, every second."""
        self._ticking = asyncio.create_task(self._tick_forever())

    @property
    def alive(self) -> bool:
        """Whether it does."""
        return self._ticking is not None and not self._ticking.done()

    async def close(self) -> None:
        """End that."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)

    # ------------------------------------------------------------------ for gateways

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> tuple[Grant | Refused, ...]:
        """Admit the tickets of one request in a single call, as far as they can begin at once.

        What ``ended`` since the gateway's last word makes room for them first.

        Returns:
            One ``Refused``, or a ``Grant`` for each ticket that begins. The others are not kept:
            they have to wait in :meth:`admit`, as resumed ones where others of their request have
            begun. Their place there is that of their arrival, but for whom enters before they are.
        """
        for id_ in ended:
            self._admission.end(id_)
        try:
            self._admission.admit(tickets)
        except DarkroomError as error:
            self._metrics.refusals.labels(refusal_reason(error)).inc()
            self._grant()
            return (Refused(error),)
        stream = _Stream(tickets, watching=False)
        self._streams.update(dict.fromkeys(stream.waiting, stream))
        try:
            self._grant()
            grants = tuple(news for news in stream.news.values() if isinstance(news, Grant))
            stream.news.clear()
        finally:
            self._give_up(stream)
        return grants

    async def admit(
        self, tickets: Sequence[Ticket], watching: bool
    ) -> AsyncGenerator[RouterNews, None]:
        """Admit the tickets of one request together, and grant each when its turn comes.

        Yields one ``Refused``; or for each ticket its place, if it has to wait (at once, and again
        with every change when ``watching``), and then its ``Grant`` or ``Expired``, or a late
        ``Refused`` when its model is removed. A ticket that was dropped because its gateway fell
        silent ends without any.

        Closed early, it gives up whatever the caller has not heard of; leases that were heard of
        are ended by :meth:`heartbeat` or :meth:`enter`.
        """
        try:
            self._admission.admit(tickets)
        except DarkroomError as error:
            self._metrics.refusals.labels(refusal_reason(error)).inc()
            yield Refused(error)
            return
        stream = _Stream(tickets, watching=watching)
        self._streams.update(dict.fromkeys(stream.waiting, stream))
        try:
            self._grant()
            self._tell_places([stream])
            while stream.waiting or stream.news:
                while stream.news:
                    yield stream.news.pop(next(iter(stream.news)))
                if stream.waiting:
                    stream.woken.clear()
                    await stream.woken.wait()
        finally:
            self._give_up(stream)

    async def heartbeat(
        self,
        gateway: str,
        running: Sequence[Grant],
        ended: Sequence[str],
        switched: Switched = NOTHING,
    ) -> Pulse:
        """A gateway's word, every second: what runs for it, and what ended that it has not told."""
        self._hear(switched)
        for id_ in ended:
            self._admission.end(id_)
        self._admission.heard(gateway, running)
        self._grant()
        return Pulse(
            models=self._published(),
            load=self._admission.table(),
            workers=tuple(worker.id for worker in self._admission.workers()),
            gateways=self._admission.gateways(),
            switched=self._switched,
        )

    async def lose(self, worker: str) -> None:
        """A gateway saw ``worker`` die."""
        if self._admission.lose(worker):
            _log.warning("worker %s is lost", worker)
            self._metrics.lost_workers.inc()

    # ------------------------------------------------------------------ for workers

    async def report(self, report: WorkerReport) -> ReportReply:
        """A worker's word, every second."""
        cancel = self._admission.report(report)
        self._metrics.orphans.inc(len(cancel))
        self._hear(report.switched)
        self._grant()
        load = self._admission.load()
        return ReportReply(
            cancel=cancel,
            outstanding_steps=load.queued_steps + load.running_steps,
            switched=self._switched,
        )

    # ------------------------------------------------------------------ for operators

    def metrics_text(self) -> bytes:
        """What it knows, in Prometheus' text format."""
        return self._metrics.text(self._admission.load(), len(self._admission.workers()))

    # ------------------------------------------------------------------ inside

    def _hear(self, switched: Switched) -> None:
        now_s = self._clock.now_s()
        self._switched = heed(self._switched, self._switched.merged(switched, now_s))

    def _published(self) -> tuple[ModelInfo, ...]:
        """The models that are configured or were added, as soon as some worker has had them.

        A model stays when no worker has it any more: one that was replaced takes it on again, and
        tickets wait for that.
        """
        reported = {
            info.id: info
            for report in reversed(self._admission.workers())
            for info in report.models
        }
        added = (name for name in self._switched.models if self._switched.added(name))
        names = dict.fromkeys((*self._configured, *added))
        known = {**self._known, **reported}
        self._known = {name: known[name] for name in names if name in known}
        return tuple(self._known.values())

    def _refuse_removed(self) -> None:
        for ticket in self._admission.drop(self._switched.removed):
            error = InvalidRequestError(f"the model {ticket.model!r} was removed", field="model")
            self._tell(ticket.id, Refused(error))

    def _grant(self) -> None:
        for grant in self._admission.grants():
            self._metrics.grants.inc()
            self._tell(grant.ticket.id, grant)

    def _tell(self, ticket_id: str, news: RouterNews) -> None:
        stream = self._streams.pop(ticket_id, None)
        if stream is None:
            self._admission.end(ticket_id)
        else:
            stream.tell(ticket_id, news)

    def _tell_places(self, streams: Iterable[_Stream]) -> None:
        waiting = [(stream, id_) for stream in streams for id_ in stream.waiting]
        places = self._admission.places() if waiting else {}
        for stream, id_ in waiting:
            if (place := places.get(id_)) is not None:
                stream.tell_place(id_, place)

    def _give_up(self, stream: _Stream) -> None:
        # A ticket that came back on another stream, as after a lost connection, is that one's.
        waiting = [id_ for id_ in stream.waiting if self._streams.get(id_) is stream]
        for id_ in waiting:
            del self._streams[id_]
            self._admission.end(id_)
        unheard = [news for news in stream.news.values() if isinstance(news, Grant)]
        for grant in unheard:
            self._admission.give_back(grant)
        if waiting or unheard:
            self._grant()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.tick()
            except Exception:
                _log.exception("a tick of the router failed; the next one goes on")

    def tick(self) -> None:
        """Look at deadlines, at who has fallen silent, and at who waits where."""
        for ticket in self._admission.sweep():
            self._tell(ticket.id, Expired(ticket.id))
        self._refuse_removed()
        self._grant()
        for id_ in self._streams.keys() - self._admission.waiting():
            self._streams.pop(id_).drop(id_)
        self._tell_places({stream for stream in self._streams.values() if stream.watching})
