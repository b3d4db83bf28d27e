"""One request on its way through router and workers.

One task of asyncio asks the router, and one for each granted picture reads from its worker; all
put their news into one bounded queue, which :meth:`Drawing.events` empties.

When a worker dies, its pictures go on from their last snapshots on another, once; those that it had
not begun just go elsewhere. When the router
dies, running pictures notice nothing, and waiting ones are admitted again with their old place.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial

from engine.errors import (
    CancelledError,
    ClosedError,
    DarkroomError,
    DeadlineExceededError,
    ExecutionError,
    InvalidRequestError,
    OverloadedError,
)
from engine.ports import Clock
from server.errors import NoRoomError, WorkerLostError
from server.ledger import Ledger
from server.messages import (
    Checkpointed,
    Drawn,
    Failed,
    ModelInfo,
    PictureEvent,
    PictureTask,
    Queued,
    Started,
)
from server.ray_grants import Grants
from server.refusals import Refusals
from server.remote import CALL_TIMEOUT_S, ReplicaLostError, RouterClient, WorkersClient
from server.routing import Grant, Place, Ticket
from server.tickets import ticket_of
from server.watch import WorkerWatch

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""Workers that a picture may begin on: if it is what kills them, that must end."""
MAX_LOST = 4
"""Workers that it may be sent to: when several die at once, some were dead before it came."""
_UNREAD = 8
"""News of a request that may wait to be read; then its workers' streams wait."""
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every request of a gateway shares."""

    name: str
    router: RouterClient
    workers: WorkersClient
    watch: WorkerWatch
    ledger: Ledger
    refusals: Refusals
    clock: Clock
    timeout_s: float
    """The deadline of a task that names none."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: DarkroomError


class Drawing:
    """Draws the tasks of one request, which share their deadline."""

    def __init__(self, tasks: Sequence[PictureTask], around: Surroundings) -> None:
        self._around = around
        self._tasks = {task.id: task for task in tasks}
        """By the name of each start; the snapshot in it is the last that was heard of."""
        self._began_at_s = around.clock.now_s()
        deadlines = [task.deadline_at_s for task in tasks if task.deadline_at_s is not None]
        self._deadline_at_s = min(deadlines, default=self._began_at_s + around.timeout_s)
        self._watching = any(task.listening for task in tasks)
        self._open = {task.index for task in tasks}
        self._news: asyncio.Queue[PictureEvent | _Refusal] = asyncio.Queue(
            max(_UNREAD, len(self._open))
        )
        self._jobs: set[asyncio.Task[None]] = set()
        self._held: set[str] = set()
        self._passed_on: tuple[Ticket, ...] = ()

    async def events(self) -> AsyncGenerator[PictureEvent, None]:
        """The events of all tasks; ends when each has its ``Drawn`` or ``Failed``.

        Raises:
            DarkroomError: refused, before the first event.
        """
        tickets = await self._tickets()
        self._spawn(partial(self._begin, tickets), tickets)
        while self._open:
            news = await self._news.get()
            if isinstance(news, _Refusal):
                raise news.error
            if isinstance(news, Drawn | Failed):
                if news.index not in self._open:
                    continue  # its work failed unforeseen when its picture was there
                self._open.remove(news.index)
            yield news

    def abandon(self, error: DarkroomError) -> None:
        """Stop working; what is not finished fails with ``error``."""
        for job in self._jobs:
            job.cancel()
        unread = [self._news.get_nowait() for _ in range(self._news.qsize())]
        finished = {news.index: news for news in unread if isinstance(news, Drawn | Failed)}
        for index in self._open:
            self._news.put_nowait(finished.get(index) or Failed(index, error))

    async def close(self) -> None:
        """Cancel what is unfinished, on the workers too, and give every lease back."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        self._around.refusals.gave_up(self._passed_on)
        for ticket_id in self._held:
            self._around.ledger.end(ticket_id)

    # ------------------------------------------------------------------ admission

    async def _tickets(self) -> list[Ticket]:
        """What the tasks cost; waits for the first worker where none is there yet.

        Raises:
            InvalidRequestError: an unknown model.
            DeadlineExceededError: no worker came in time.
            NoRoomError, LimitExceededError: by what the router has said lately, it would refuse.
        """
        try:
            async with asyncio.timeout(self._left_s()):
                pulse = await self._around.ledger.first_pulse()
        except TimeoutError:
            raise DeadlineExceededError("no worker came up before the deadline") from None
        models = {model.id: model for model in pulse.models}
        tickets = [self._ticket(task, models) for task in self._tasks.values()]
        self._around.refusals.pass_on(tickets)
        self._passed_on = tuple(tickets)
        return tickets

    def _ticket(self, task: PictureTask, models: Mapping[str, ModelInfo]) -> Ticket:
        model = models.get(task.model)
        if model is None:
            raise InvalidRequestError(
                f"unknown model {task.model!r}; allowed: {', '.join(models)}", field="model"
            )
        ticket = ticket_of(task, model, gateway=self._around.name, arrived_at_s=self._began_at_s)
        return replace(ticket, deadline_at_s=self._deadline_at_s)

    async def _begin(self, tickets: Sequence[Ticket]) -> None:
        """Admit all tickets, and start each as it is granted."""
        try:
            async for grant in self._grants().of(tickets):
                self._around.refusals.granted(grant.ticket)
                self._spawn(partial(self._run, grant), [grant.ticket])
        except NoRoomError as error:
            self._around.refusals.note(tickets, error)
            await self._news.put(_Refusal(error))
        except DarkroomError as error:
            await self._news.put(_Refusal(error))

    def _grants(self) -> Grants:
        async def late(ticket: Ticket) -> None:
            self._around.refusals.gave_up([ticket])
            await self._fail(ticket, DeadlineExceededError("the deadline passed in the queue"))

        async def placed(place: Place) -> None:
            index = self._tasks[place.ticket_id].index
            await self._news.put(Queued(index, place.position, place.steps_ahead))

        return Grants(
            router=self._around.router,
            ledger=self._around.ledger,
            left_s=self._left_s,
            watching=self._watching,
            held=self._hold,
            placed=placed,
            late=late,
        )

    # ------------------------------------------------------------------ drawing

    async def _run(self, grant: Grant) -> None:
        """Draw one picture on the worker that was granted, and if that dies on another."""
        deaths = lost = 0
        for number in itertools.count(2):
            try:
                unfinished, begun = await self._draw(grant, attempt=deaths + 1)
            finally:
                self._around.ledger.end(grant.ticket.id)
            if unfinished is None:
                return
            name = grant.ticket.id
            _log.warning("task %s is not finished by %s: %s", name, grant.worker, unfinished)
            if isinstance(unfinished, OverloadedError):
                await asyncio.sleep(_PAUSE_S)  # full after all: the router's count is a moment old
            else:
                await self._tell_lost(grant.worker)
            gone = isinstance(unfinished, ReplicaLostError | CancelledError)
            lost += gone
            deaths += gone and begun
            if deaths == MAX_ATTEMPTS or lost == MAX_LOST:
                error = WorkerLostError(f"{lost} workers died with this picture")
                await self._fail(grant.ticket, error)
                return
            ticket = self._again(grant.ticket, number)
            again = [grant async for grant in self._grants().of([ticket])]
            if not again:
                return  # its deadline passed
            [grant] = again

    async def _draw(self, grant: Grant, *, attempt: int) -> tuple[DarkroomError | None, bool]:
        """Pass on what the worker says.

        Returns:
            Why another worker has to go on, if one has to; and whether this one had begun.
        """
        task = self._tasks[grant.ticket.id]
        waited_s = self._around.clock.now_s() - self._began_at_s
        unfinished: DarkroomError | None = ReplicaLostError("the worker ended without a word")
        begun = False
        try:
            # Read to its end: leaving a stream early cancels the call behind it.
            async with (
                self._around.watch.over(grant.worker),
                aclosing(self._around.workers.draw(grant.worker, task)) as events,
            ):
                async for event in events:
                    match event:
                        case Checkpointed():
                            self._tasks[task.id] = replace(task, snapshot=event.snapshot)
                        case Started():
                            begun = True
                            await self._news.put(replace(event, attempt=attempt))
                        case Failed(error=ClosedError() | OverloadedError() | CancelledError()):
                            unfinished = event.error  # the worker's: nobody here cancelled
                        case Drawn():
                            await self._news.put(_after(event, waited_s, attempt))
                            unfinished = None
                        case Failed():
                            await self._news.put(event)
                            unfinished = None
                        case _:
                            await self._news.put(event)
        except ReplicaLostError as error:
            unfinished = None if unfinished is None else error
        return unfinished, begun

    def _again(self, ticket: Ticket, number: int) -> Ticket:
        """The same task from where it stands, under a name that nothing late can refer to."""
        name = f"{ticket.id.partition('~')[0]}~{number}"
        self._tasks[name] = replace(self._tasks[ticket.id], id=name)
        return replace(ticket, id=name, resumed=True)

    async def _tell_lost(self, worker: str) -> None:
        with suppress(ReplicaLostError, TimeoutError):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._around.router.lose(worker)

    # ------------------------------------------------------------------ inside

    def _hold(self, grant: Grant) -> None:
        self._held.add(grant.ticket.id)
        self._around.ledger.hold(grant)

    async def _fail(self, ticket: Ticket, error: DarkroomError) -> None:
        await self._news.put(Failed(self._tasks[ticket.id].index, error))

    def _left_s(self) -> float:
        return self._deadline_at_s - self._around.clock.now_s()

    def _spawn(self, work: Callable[[], Awaitable[None]], tickets: Iterable[Ticket]) -> None:
        """Run ``work`` beside the reader; if it fails unforeseen, ``tickets`` fail with it."""

        async def job() -> None:
            try:
                await work()
            except Exception as error:
                _log.exception("drawing failed unforeseen")
                planned = error if isinstance(error, DarkroomError) else None
                failure = planned or ExecutionError("the server failed; its log says why")
                for ticket in tickets:
                    await self._fail(ticket, failure)

        self._jobs.add(asyncio.create_task(job()))


def _after(drawn: Drawn, waited_s: float, attempt: int) -> Drawn:
    """A worker's picture with what happened before it got there."""
    timings = replace(drawn.timings, queue_s=drawn.timings.queue_s + waited_s)
    return replace(drawn, timings=timings, attempts=attempt)
