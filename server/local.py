"""A dispatcher around one worker in this process: for tests, notebooks and small machines.

It admits and orders tasks by the very policy of the router (:mod:`server.admission`), so that what
is learned here holds there; what it lacks is a second worker to go on with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from engine.errors import (
    ClosedError,
    DarkroomError,
    DeadlineExceededError,
    InvalidRequestError,
)
from server import request_log
from server.admission import Admission
from server.config import ServeConfig
from server.fleet import AdmissionPolicy
from server.messages import (
    CacheAnswer,
    CacheOrder,
    Checkpointed,
    Drawn,
    Failed,
    Load,
    ModelChange,
    ModelInfo,
    PictureEvent,
    PictureTask,
    Queued,
    Readiness,
)
from server.request_log import Level
from server.routing import Grant
from server.tickets import ticket_of
from server.worker_core import WorkerCore

_GATEWAY = "local"


@dataclass(frozen=True, slots=True)
class _UnixClock:
    """The admission's clock."""

    now_s: Callable[[], float]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A task of an admitted request: with a place in the queue, or a grant once it may start.

    ``moved`` is set when either changes, and when its model is removed.
    """

    task: PictureTask
    place: tuple[int, int] = (0, 0)
    grant: Grant | None = None
    removed: bool = False
    moved: asyncio.Event = field(default_factory=asyncio.Event)


class LocalDispatcher:
    """Implements :class:`server.dispatch.Dispatcher` on one open :class:`WorkerCore`.

    Belongs to one event loop. :meth:`close` closes the worker too.

    Args:
        unix_s: the time that deadlines are given in.
    """

    def __init__(
        self, config: ServeConfig, worker: WorkerCore, *, unix_s: Callable[[], float] = time.time
    ) -> None:
        self._worker = worker
        self._unix_s = unix_s
        self._admission = Admission(
            config.admission,
            weights={tenant.id: tenant.weight for tenant in config.auth.tenants},
            clock=_UnixClock(unix_s),
            policy=AdmissionPolicy(max_live=config.workers.max_live),
        )
        self._tasks: dict[str, _Waiting] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    def draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        """Draw the pictures of one request; see :meth:`Dispatcher.draw`."""
        return self._draw(tuple(tasks))

    async def models(self) -> Sequence[ModelInfo]:
        """The configured models; the default first."""
        return self._worker.models.infos

    async def change_model(self, change: ModelChange) -> ModelInfo | None:
        """Add, reload or remove a model; see :meth:`Dispatcher.change_model`."""
        changes = self._worker.changes
        change = changes.switched.stamped(change, self._unix_s())
        info = await asyncio.to_thread(changes.apply, change)
        changes.hear(changes.switched.with_model(change))
        for ticket in self._admission.drop(changes.switched.removed):
            self._tasks[ticket.id].removed = True
            self._tasks[ticket.id].moved.set()
        return info

    async def ask_caches(self, order: CacheOrder) -> Sequence[CacheAnswer]:
        """Look into the worker's noise cache, or clear it."""
        shares = await asyncio.to_thread(self._worker.ask_cache, order)
        return [CacheAnswer(worker=self._worker.name, shares=shares)]

    async def set_log_level(self, level: Level) -> None:
        """Switch it; there is but one process."""
        request_log.set_level(level)

    async def readiness(self) -> Readiness:
        """Whether every configured model is warm."""
        missing = tuple(self._worker.missing)
        return Readiness(
            ready=not missing and not self._closing,
            workers=1,
            missing=missing,
            draining=self._closing,
        )

    async def load(self) -> Load:
        """How busy the worker and the queue before it are."""
        self._admission.report(self._worker.report())
        return self._admission.load()

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """The worker's."""
        return [(self._worker.name, self._worker.metrics_text())]

    async def close(self, timeout_s: float) -> None:
        """Take nothing more, finish what runs and waits, and give up after ``timeout_s``."""
        self._closing = True
        ends_at_s = self._unix_s() + timeout_s
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._worker.stop_admitting()
        await asyncio.to_thread(self._worker.close, max(0.0, ends_at_s - self._unix_s()))

    # ------------------------------------------------------------------ admission

    def _admit(self, tasks: Sequence[PictureTask]) -> list[_Waiting]:
        """Take the tasks of a request, all or none; starts those that may.

        Raises:
            DarkroomError: see :meth:`Dispatcher.draw`.
        """
        if self._closing:
            raise ClosedError("the server is shutting down and takes no more work")
        for task in tasks:
            if task.id in self._tasks:
                raise InvalidRequestError(f"task {task.id} is here already", field="id")
        now_s = self._unix_s()
        self._admission.report(self._worker.report())
        self._admission.admit(
            [
                ticket_of(
                    task, self._worker.models.info(task.model), gateway=_GATEWAY, arrived_at_s=now_s
                )
                for task in tasks
            ]
        )
        waiting = [_Waiting(task) for task in tasks]
        self._tasks.update({item.task.id: item for item in waiting})
        self._idle.clear()
        self._turn()
        return waiting

    def _turn(self) -> None:
        """Do what the router does at every beat: hear everybody, forget, and grant."""
        running = [item.grant for item in self._tasks.values() if item.grant is not None]
        self._admission.report(self._worker.report())
        self._admission.heard(_GATEWAY, running)
        self._admission.sweep()  # whoever waits for what is late sees to the deadline itself
        for grant in self._admission.grants():
            item = self._tasks[grant.ticket.id]
            item.grant = grant
            item.moved.set()
        for task_id, place in self._admission.places().items():
            item = self._tasks[task_id]
            if place != item.place:
                item.place = place
                item.moved.set()

    def _end(self, item: _Waiting) -> None:
        del self._tasks[item.task.id]
        self._admission.end(item.task.id)
        self._turn()
        if not self._tasks:
            self._idle.set()

    # ------------------------------------------------------------------ drawing

    async def _draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        waiting = self._admit(tasks)
        # Bounded: a reader that falls behind holds up its own pumps, and nobody else's.
        events: asyncio.Queue[PictureEvent] = asyncio.Queue(maxsize=8)
        pumps = [asyncio.create_task(self._pump(item, events)) for item in waiting]
        unfinished = len(pumps)
        try:
            while unfinished:
                event = await events.get()
                unfinished -= isinstance(event, Drawn | Failed)
                yield event
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, item: _Waiting, events: asyncio.Queue[PictureEvent]) -> None:
        """Wait until the task may start, then pass the worker's news on."""
        try:
            try:
                waited_s = await self._wait(item, events)
                async with aclosing(self._worker.draw(item.task)) as news:
                    async for event in news:
                        if isinstance(event, Drawn):
                            await events.put(_waited(event, waited_s))
                        elif not isinstance(event, Checkpointed):
                            # A snapshot is of no use here: it would die with this process.
                            await events.put(event)
            except DarkroomError as error:
                await events.put(Failed(item.task.index, error))
        finally:
            self._end(item)

    async def _wait(self, item: _Waiting, events: asyncio.Queue[PictureEvent]) -> float:
        """Seconds that the task waited for its start, its place told whenever it changes."""
        began_s = self._unix_s()
        while item.grant is None:
            if item.removed:
                raise InvalidRequestError(f"{item.task.model} was removed", field="model")
            if item.moved.is_set():
                item.moved.clear()
                await events.put(Queued(item.task.index, *item.place))
            deadline_at_s = item.task.deadline_at_s
            left_s = None if deadline_at_s is None else deadline_at_s - self._unix_s()
            try:
                await asyncio.wait_for(item.moved.wait(), left_s)
            except TimeoutError:
                raise DeadlineExceededError("the deadline passed in the queue") from None
        return self._unix_s() - began_s


def _waited(picture: Drawn, seconds: float) -> Drawn:
    """The picture with the time before the worker added to its queueing."""
    timings = picture.timings
    return replace(picture, timings=replace(timings, queue_s=timings.queue_s + seconds))
