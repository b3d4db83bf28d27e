"""One job on its way through the dispatcher, from a gateway that owns it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from engine.errors import ClosedError, DarkroomError, DeadlineExceededError, OverloadedError
from server.dispatch import Dispatcher
from server.errors import JobsUnavailableError, WorkerLostError, body_of
from server.jobs.outbox import Outbox
from server.jobs.records import Job, JobPicture, JobPreview, Status
from server.jobs.store import JobLostError, JobStore
from server.messages import Drawn, Failed, PictureEvent, Queued, Started, Stepped
from server.schemas.draw import DrawnReply

_log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3
"""Gateways that may die while they run one job; then it is taken to be the reason."""
_LOOK_S = 5.0
_RETRY_S = (1.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What every job of a gateway shares.

    Attributes:
        now_s: Unix time.
        drew: told of each finished picture, its tenant and its job, for the metrics.
        ended: told of each job's end, and of the seconds since it was made.
    """

    dispatcher: Dispatcher
    store: JobStore
    now_s: Callable[[], float]
    drew: Callable[[Drawn, str, str], None]
    ended: Callable[[Status, float], None]


class Drive:
    """Draws what a job still lacks, and tells the store.

    Args:
        last_number: of the events that the store has.
    """

    def __init__(self, job: Job, means: Means, *, last_number: int = 0) -> None:
        self._job = job
        self._means = means
        self._out = Outbox(means.store, job, last_number=last_number)
        self._queued: dict[int, Queued] = {}
        self.admitted = False
        """Whether the dispatcher has taken the pictures that are left."""
        if job.cancelling:
            self._out.cancelling.set()

    @property
    def status(self) -> Status:
        """How far the job is."""
        return self._out.state.status

    def cancel(self) -> None:
        """End the job before its pictures' next step."""
        self._out.cancelling.set()

    async def run(self) -> None:
        """Return when the job's end is written, or when the job is somebody else's.

        Cancelled, it stops drawing and leaves the job as it is, for another gateway to adopt.
        """
        sending = asyncio.create_task(self._out.send())
        ending = asyncio.create_task(self._until_end())
        try:
            await asyncio.wait({sending, ending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():  # before any end: it was lost
                sending.result()
            ending.result()
            await sending
        except JobLostError:
            _log.warning("a job was taken over by another gateway; it is no longer drawn here")
        finally:
            for task in (sending, ending):
                task.cancel()
            await asyncio.gather(sending, ending, return_exceptions=True)

    async def _until_end(self) -> None:
        """Draw until done, failed or cancelled, whichever comes first, and note the end."""
        status: Status = "cancelled"
        if self._job.state.attempts > MAX_ATTEMPTS:
            lost = WorkerLostError(f"given up: {MAX_ATTEMPTS} gateways were lost with this job")
            self._fail(lost)
            return
        if self._job.state.attempts > 1:
            self._out.tell("resumed", {"attempt": self._job.state.attempts})
        try:
            if not self._out.cancelling.is_set() and await self._first(self._draw()):
                status = "succeeded"
        except DarkroomError as error:
            self._fail(error)
            return
        except Exception as error:
            _log.exception("a job failed for no planned reason")
            self._fail(error)
            return
        self._end(status)

    async def _first(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether ``work`` ended before somebody cancelled the job; if not, it is cancelled."""
        working = asyncio.create_task(work)
        cancelling = asyncio.create_task(self._cancelled())
        try:
            await asyncio.wait({working, cancelling}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return True
            return False
        finally:
            for task in (working, cancelling):
                task.cancel()
            await asyncio.gather(working, cancelling, return_exceptions=True)

    async def _cancelled(self) -> None:
        """Return when somebody cancels the job. Writes tell; where there are none, we look."""
        job_id = self._job.spec.id
        while not self._out.cancelling.is_set():
            number = self._out.last_number
            told = asyncio.create_task(self._out.cancelling.wait())
            heard = asyncio.create_task(self._means.store.heard(job_id, _LOOK_S))
            try:
                await asyncio.wait({told, heard}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                told.cancel()
                heard.cancel()
                await asyncio.gather(told, heard, return_exceptions=True)
            if number == self._out.last_number and await self._asked():
                return

    async def _asked(self) -> bool:
        try:
            job = await self._means.store.job(self._job.spec.id)
        except JobsUnavailableError:
            return False
        return job is not None and job.cancelling

    async def _draw(self) -> None:
        """Ask the dispatcher until it takes the tasks, then draw them.

        Raises:
            DarkroomError: why the job failed.
        """
        while tasks := self._job.spec.tasks(self._job.state.attempts, self._out.state.done()):
            try:
                async with aclosing(self._means.dispatcher.draw(tasks)) as events:
                    async for event in events:
                        self.admitted = True
                        self._take(event)
            except (OverloadedError, ClosedError) as refusal:
                await self._wait(refusal)

    async def _wait(self, refusal: OverloadedError | ClosedError) -> None:
        """A job has time: refusals put it off, as long as its deadline allows."""
        least_s, most_s = _RETRY_S
        wished_s = getattr(refusal, "retry_after_s", None) or least_s
        wait_s = min(max(wished_s, least_s), most_s)
        self.admitted = False
        if self._means.now_s() + wait_s >= self._job.spec.deadline_at_s:
            raise DeadlineExceededError("the deadline passed while the server was too busy")
        await asyncio.sleep(wait_s)

    def _take(self, event: PictureEvent) -> None:
        match event:
            case Queued(index, position, steps_ahead):
                if self._queued.get(index) != event:
                    self._queued[index] = event
                    place = {"index": index, "position": position, "steps_ahead": steps_ahead}
                    self._out.tell("queued", place)
            case Started(index, worker, attempt):
                if self._out.state.status == "queued":
                    self._out.change(status="running", started_at_s=self._means.now_s())
                begun = {"index": index, "worker": worker, "attempt": attempt}
                self._out.tell("started", begun)
            case Stepped(index, step, steps, preview):
                if preview is not None:
                    self._out.add_preview(JobPreview(index, step, preview))
                done = {"index": index, "step": step, "steps": steps}
                self._out.tell("progress", {**done, "preview": preview is not None})
            case Drawn():
                self._keep(event)
            case Failed(_, error):
                raise error

    def _keep(self, picture: Drawn) -> None:
        known = DrawnReply.of(picture).model_dump()
        self._out.add_picture(JobPicture(picture.index, picture.format, picture.data))
        pictures = {**self._out.state.pictures, str(picture.index): known}
        self._out.change(pictures=pictures)
        self._out.tell("picture", known)
        self._means.drew(picture, self._job.spec.tenant, self._job.spec.id)

    def _fail(self, error: BaseException) -> None:
        detail = body_of(error)["error"]
        self._out.change(error=detail)
        self._end("failed", error=detail)

    def _end(self, status: Status, **data: Any) -> None:
        spec, state = self._job.spec, self._out.state
        duration_s = self._means.now_s() - spec.created_at_s
        self._means.ended(status, duration_s)
        fields: dict[str, Any] = {
            "job": spec.id,
            "tenant": spec.tenant,
            "model": spec.model,
            "status": status,
            "pictures": len(state.pictures),
            "attempts": self._job.state.attempts,
            "duration_ms": round(duration_s * 1000),
        }
        _log.info("job", extra={"darkroom_fields": fields})
        # The event first: the write that holds the final state is the last one.
        self._out.tell(status, {"status": status, **data})
        self._out.change(status=status, finished_at_s=self._means.now_s())
