"""Jobs of one gateway: takes them in, runs them over the dispatcher, keeps them alive.

A gateway beats every four seconds. One that has been silent for fifteen is taken for dead, and any
gateway that shares its store adopts its jobs: pictures that are finished stay, the others are drawn
again with the seeds that they had. A gateway that ends in good order leaves its jobs at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from engine.errors import ClosedError, DarkroomError
from server.config import JobsConfig
from server.dispatch import Dispatcher
from server.errors import ConflictError, JobsUnavailableError, NotFoundError
from server.jobs.drive import Drive, Means
from server.jobs.metrics import JobMetrics
from server.jobs.records import (
    FINAL,
    MAX_EVENTS,
    Job,
    JobEvent,
    JobPicture,
    JobSpec,
    JobState,
    WebhookTarget,
)
from server.jobs.store import IdempotencyKey, JobStore
from server.jobs.webhooks import Courier
from server.links import Links
from server.messages import Drawn

if TYPE_CHECKING:
    from server.metrics import GatewayMetrics

_log = logging.getLogger(__name__)

BEAT_S = 4.0
ALIVE_S = 15.0
_RUNNING_PER_TENANT = 64
"""Jobs of one tenant that wait at the dispatcher at once: fairness between tenants is its."""
_ADOPT_AT_ONCE = 64
_ENDED = 256
_LOOK_S = 1.0
_PATIENCE_S = 60.0
"""How long a reader of events waits for a store that is away."""


class JobRunner:
    """Makes, runs, shows and ends jobs. Construct it anywhere; :meth:`start` it in its event loop.

    Another tenant's job is not there: every method that takes a tenant raises ``NotFoundError``.

    Args:
        owner: this process's name; by default one that nobody else has.
        now_s: Unix time.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        store: JobStore,
        config: JobsConfig,
        metrics: GatewayMetrics | None = None,
        courier: Courier | None = None,
        owner: str | None = None,
        now_s: Callable[[], float] = time.time,
        beat_s: float = BEAT_S,
        alive_s: float = ALIVE_S,
    ) -> None:
        def drew(picture: Drawn, tenant: str, job_id: str) -> None:
            if metrics is not None:
                metrics.drew([picture], tenant=tenant, request_id=job_id)

        counted = JobMetrics(CollectorRegistry()) if metrics is None else metrics.jobs
        counted.watch(lambda: [drive.status for drive in self._drives.values()])
        self._store = store
        self._links = Links(store, ttl_s=config.link_ttl_s, now_s=now_s)
        self._means = Means(
            dispatcher=dispatcher, store=store, now_s=now_s, drew=drew, ended=counted.ended
        )
        self._courier = courier or Courier(store, config, now_s=now_s, told=counted.delivery)
        self._owner = owner or f"gateway-{secrets.token_hex(8)}"
        self._now_s = now_s
        self._beat_s = beat_s
        self._alive_s = alive_s
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_RUNNING_PER_TENANT)
        )
        self._drives: dict[str, Drive] = {}
        self._runs: dict[asyncio.Task[None], Drive] = {}
        self._background: list[asyncio.Task[None]] = []
        self._ended: deque[tuple[str, int]] = deque(maxlen=_ENDED)
        self._adopt_after_s = 0.0
        self._closing = False

    @property
    def store(self) -> JobStore:
        """Where jobs are kept."""
        return self._store

    @property
    def links(self) -> Links:
        """Links to pictures."""
        return self._links

    def check_webhook(self, target: WebhookTarget) -> None:
        """Refuse a webhook that would never be called.

        Raises:
            InvalidRequestError, ForbiddenError: its URL or secret is none, or its host not allowed.
        """
        self._courier.check(target)

    @property
    def running(self) -> int:
        """Jobs that this gateway owns."""
        return len(self._runs)

    async def start(self) -> None:
        """Beat, look for orphans, deliver webhooks. A store that is away delays, and no more."""
        await self._store.start()
        for work in (self._beat, self._look_after, self._courier.run):
            self._background.append(asyncio.create_task(_forever(work)))

    async def close(self, timeout_s: float) -> None:
        """Finish what is drawn, for at most ``timeout_s``; what is left is left to others."""
        self._closing = True
        for run in [run for run, drive in self._runs.items() if not drive.admitted]:
            run.cancel()
        if self._runs:
            await asyncio.wait(self._runs, timeout=timeout_s)
        for task in (*self._background, *self._runs):
            task.cancel()
        await asyncio.gather(*self._background, *self._runs, return_exceptions=True)
        try:
            await self._store.leave(self._owner)
        except JobsUnavailableError:
            _log.warning("the store of jobs is away; others adopt what is left in a while")
        await self._courier.close()
        await self._store.close()

    # ---------------------------------------------------------------- what clients ask for

    async def submit(self, spec: JobSpec, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Make a job and begin it, unless ``key`` names one that is there already.

        Returns:
            The job, and whether it was there already.

        Raises:
            ConflictError: the key was used with another body, or its job is gone.
            ClosedError: this gateway is closing.
            JobsFullError, JobsUnavailableError: as :class:`JobStore` says.
        """
        if self._closing:
            raise ClosedError("the server is shutting down and takes no more jobs")
        job = Job(spec=spec, state=JobState(), owner=self._owner)
        await self._store.beat(self._owner, self._alive_s)
        known = await self._store.create(job, key)
        if known is None:
            self._begin(job)
            return job, False
        assert key is not None
        if known.digest != key.digest:
            raise ConflictError(
                "this Idempotency-Key was used with another body", field="idempotency-key"
            )
        there = await self._store.job(known.job_id)
        if there is None:
            raise ConflictError(
                "the job of this Idempotency-Key is gone; a new one needs a new key",
                field="idempotency-key",
            )
        return there, True

    async def job(self, tenant: str, job_id: str) -> Job:
        """A tenant's job."""
        job = await self._store.job(job_id)
        if job is None or job.spec.tenant != tenant:
            raise NotFoundError("there is no such job", field="id")
        return job

    async def jobs(self, tenant: str, limit: int, before: str | None = None) -> Sequence[Job]:
        """A tenant's jobs, the newest first."""
        if before is not None:
            await self.job(tenant, before)
        return await self._store.jobs(tenant, limit, before)

    async def picture(self, tenant: str, job_id: str, index: int) -> JobPicture:
        """A finished picture."""
        await self.job(tenant, job_id)
        picture = await self._store.picture(job_id, index)
        if picture is None:
            raise NotFoundError("there is no such picture, or not yet", field="index")
        return picture

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """End an unfinished job before its next step; forget a finished one."""
        job = await self.job(tenant, job_id)
        if job.state.final:
            await self._store.forget(job_id)
            return job
        await self._store.cancel(job_id)
        if job_id in self._drives:
            self._drives[job_id].cancel()
        return await self.job(tenant, job_id)

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[list[JobEvent], None]:
        """Events with numbers above ``after``, in pieces, until the job's last one.

        Raises:
            JobsUnavailableError: the store has been away for a minute.
        """
        away_since_s: float | None = None
        over = False
        while True:
            # Listening before reading: nothing that comes in between is missed.
            heard = asyncio.create_task(self._store.heard(job_id, _LOOK_S))
            try:
                events = list(await self._store.events(job_id, after))
                if events:
                    after = events[-1].number
                    yield events
                if over or any(event.name in FINAL for event in events):
                    return
                # What is over has told everything by now: one more look, and that was all.
                over = not events and await self._is_over(job_id)
                if not (events or over):
                    await heard
                away_since_s = None
            except JobsUnavailableError:
                away_since_s = away_since_s or self._now_s()
                if self._now_s() - away_since_s > _PATIENCE_S:
                    raise
                await heard
            finally:
                heard.cancel()
                await asyncio.gather(heard, return_exceptions=True)

    # ---------------------------------------------------------------- what keeps them alive

    def _begin(self, job: Job, *, last_number: int = 0) -> None:
        if job.spec.id in self._drives:
            return
        drive = Drive(job, self._means, last_number=last_number)
        self._drives[job.spec.id] = drive
        run = asyncio.create_task(self._run(job, drive))
        self._runs[run] = drive
        run.add_done_callback(self._runs.pop)

    async def _run(self, job: Job, drive: Drive) -> None:
        try:
            async with self._turns[job.spec.tenant]:
                await drive.run()
        except Exception:
            _log.exception("a job's run ended for no planned reason")
        finally:
            del self._drives[job.spec.id]
            self._ended.append((job.spec.id, job.state.attempts))

    async def _beat(self) -> None:
        try:
            await self._store.beat(self._owner, self._alive_s)
            await asyncio.sleep(self._beat_s)
        except JobsUnavailableError:
            await asyncio.sleep(min(1.0, self._beat_s))

    async def _look_after(self) -> None:
        """Adopt orphans, and drop what is over.

        A store that was away has forgotten everybody's beats: we wait until all had their chance
        to beat again, lest two gateways draw one job.
        """
        try:
            if self._now_s() >= self._adopt_after_s:
                for job in await self._store.adopt(self._owner, _ADOPT_AT_ONCE, self._drives):
                    events = await self._store.events(job.spec.id, 0, MAX_EVENTS)
                    # What began and ended here while we asked is not begun again.
                    if (job.spec.id, job.state.attempts) not in self._ended:
                        self._begin(job, last_number=events[-1].number if events else 0)
            await self._store.sweep()
        except JobsUnavailableError:
            self._adopt_after_s = self._now_s() + self._alive_s
        await asyncio.sleep(self._beat_s)

    async def _is_over(self, job_id: str) -> bool:
        job = await self._store.job(job_id)
        return job is None or job.state.final


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    """Do ``work`` again and again; what it fails of is logged, and it goes on."""
    while True:
        try:
            await work()
        except DarkroomError as error:
            _log.warning("background work of jobs failed: %s", error)
            await asyncio.sleep(1.0)
        except Exception:
            _log.exception("background work of jobs failed")
            await asyncio.sleep(1.0)
