"""Jobs in this process: gone with it, and known to no other gateway."""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from server.jobs.bell import Bell
from server.jobs.records import (
    MAX_EVENTS,
    Change,
    Job,
    JobEvent,
    JobPicture,
    JobPreview,
)
from server.jobs.store import (
    Bounds,
    IdempotencyKey,
    JobGoneError,
    JobLostError,
    JobsFullError,
    Known,
)


@dataclass(slots=True)
class _Entry:
    job: Job
    events: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    pictures: dict[int, JobPicture] = field(default_factory=dict)
    previews: dict[int, JobPreview] = field(default_factory=dict)
    last_number: int = 0

    @property
    def size_bytes(self) -> int:
        held: list[JobPicture | JobPreview] = [*self.pictures.values(), *self.previews.values()]
        return sum(len(item.data) for item in held)


@dataclass(slots=True)
class _Due:
    at_s: float
    tries: int = 0


class MemoryJobStore:
    """Implements :class:`server.jobs.store.JobStore` with dictionaries."""

    def __init__(self, bounds: Bounds, *, now_s: Callable[[], float]) -> None:
        self._bounds = bounds
        self._now_s = now_s
        self._jobs: OrderedDict[str, _Entry] = OrderedDict()
        self._keys: OrderedDict[tuple[str, str], tuple[float, Known]] = OrderedDict()
        self._beats: dict[str, float] = {}
        self._due: dict[str, _Due] = {}
        self._bell = Bell()
        self._secret = secrets.token_bytes(32)

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to let go of."""

    # ---------------------------------------------------------------- anybody

    async def create(self, job: Job, key: IdempotencyKey | None = None) -> Known | None:
        """See :class:`JobStore`."""
        now_s = self._now_s()
        if key is not None:
            expires_at_s, known = self._keys.get((job.spec.tenant, key.name), (0.0, None))
            if known is not None and now_s < expires_at_s:
                return known
        self._check_room()
        if key is not None:
            self._remember(job, key, now_s)
        self._jobs[job.spec.id] = _Entry(job)
        return None

    async def job(self, job_id: str) -> Job | None:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        return None if entry is None else entry.job

    async def jobs(self, tenant: str, limit: int, before: str | None = None) -> Sequence[Job]:
        """See :class:`JobStore`."""
        mine = [
            entry.job
            for job_id in reversed(self._jobs)
            if (entry := self._entry(job_id)) is not None
            and entry.job.spec.listed
            and entry.job.spec.tenant == tenant
        ]
        ids = [job.spec.id for job in mine]
        first = ids.index(before) + 1 if before in ids else 0
        return mine[first : first + limit]

    async def events(self, job_id: str, after: int, limit: int = 256) -> Sequence[JobEvent]:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        if entry is None:
            return []
        return [event for event in entry.events if event.number > after][:limit]

    async def heard(self, job_id: str, timeout_s: float) -> None:
        """See :class:`JobStore`."""
        await self._bell.wait(job_id, timeout_s)

    async def picture(self, job_id: str, index: int) -> JobPicture | None:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        return None if entry is None else entry.pictures.get(index)

    async def preview(self, job_id: str, index: int) -> JobPreview | None:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        return None if entry is None else entry.previews.get(index)

    async def cancel(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        if entry is not None and not entry.job.state.final:
            entry.job = replace(entry.job, cancelling=True)
            self._bell.ring(job_id)

    async def forget(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        entry = self._entry(job_id)
        if entry is not None and entry.job.state.final:
            self._drop(job_id)

    async def secret(self) -> bytes:
        """See :class:`JobStore`."""
        return self._secret

    # ---------------------------------------------------------------- owners

    async def write(self, job: Job, change: Change) -> bool:
        """See :class:`JobStore`."""
        job_id = job.spec.id
        entry = self._entry(job_id)
        if entry is None:
            raise JobGoneError("the store does not know the job")
        if entry.job.owner != job.owner or entry.job.state.final:
            raise JobLostError("the job has another owner, or is done")
        for event in change.events:
            if event.number > entry.last_number:
                entry.events.append(event)
                entry.last_number = event.number
        entry.pictures |= {picture.index: picture for picture in change.pictures}
        entry.previews |= {preview.index: preview for preview in change.previews}
        entry.job = replace(entry.job, state=change.state)
        if change.state.final:
            entry.previews.clear()
            if entry.job.spec.webhook is not None:
                self._due[job_id] = _Due(self._now_s())
            await self.sweep()
        self._bell.ring(job_id)
        return entry.job.cancelling

    async def restore(self, job: Job) -> None:
        """See :class:`JobStore`."""
        self._jobs.setdefault(job.spec.id, _Entry(job))

    async def beat(self, owner: str, alive_s: float) -> None:
        """See :class:`JobStore`."""
        self._beats[owner] = self._now_s() + alive_s

    async def leave(self, owner: str) -> None:
        """See :class:`JobStore`."""
        self._beats.pop(owner, None)

    async def adopt(
        self, owner: str, limit: int, running: Collection[str] | None = None
    ) -> Sequence[Job]:
        """See :class:`JobStore`."""
        now_s = self._now_s()
        self._beats = {name: at_s for name, at_s in self._beats.items() if at_s > now_s}
        adopted: list[Job] = []
        for job_id, entry in self._jobs.items():
            job = entry.job
            if job.state.final or len(adopted) == limit:
                continue
            if job.owner == owner:
                if running is not None and job_id not in running:
                    adopted.append(job)
            elif job.owner not in self._beats:
                state = replace(job.state, attempts=job.state.attempts + 1)
                entry.job = replace(job, owner=owner, state=state)
                adopted.append(entry.job)
        return adopted

    async def sweep(self) -> None:
        """See :class:`JobStore`."""
        finished = sorted(
            (entry for entry in self._jobs.values() if entry.job.state.final),
            key=lambda entry: entry.job.state.finished_at_s or 0.0,
        )
        held_bytes = sum(entry.size_bytes for entry in finished)
        count = len(finished)
        for entry in finished:
            over = count > self._bounds.max_jobs or held_bytes > self._bounds.max_bytes
            if not (over or self._expired(entry)):
                break
            held_bytes -= entry.size_bytes
            count -= 1
            self._drop(entry.job.spec.id)

    # ---------------------------------------------------------------- webhooks

    async def due_webhook(self, busy_s: float) -> tuple[Job, int] | None:
        """See :class:`JobStore`."""
        now_s = self._now_s()
        for job_id, due in self._due.items():
            entry = self._entry(job_id)
            if entry is not None and due.at_s <= now_s:
                due.at_s = now_s + busy_s
                due.tries += 1
                return entry.job, due.tries - 1
        return None

    async def put_off_webhook(self, job_id: str, seconds: float) -> None:
        """See :class:`JobStore`."""
        if job_id in self._due:
            self._due[job_id].at_s = self._now_s() + seconds

    async def settle_webhook(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        self._due.pop(job_id, None)

    # ---------------------------------------------------------------- helpers

    def _entry(self, job_id: str) -> _Entry | None:
        entry = self._jobs.get(job_id)
        return None if entry is None or self._expired(entry) else entry

    def _expired(self, entry: _Entry) -> bool:
        ended_at_s = entry.job.state.finished_at_s
        return ended_at_s is not None and self._now_s() >= ended_at_s + self._bounds.ttl_s

    def _check_room(self) -> None:
        unfinished = sum(not entry.job.state.final for entry in self._jobs.values())
        if unfinished >= self._bounds.max_jobs:
            raise JobsFullError(f"{self._bounds.max_jobs} jobs are unfinished, which is the bound")

    def _remember(self, job: Job, key: IdempotencyKey, now_s: float) -> None:
        known = Known(job.spec.id, key.digest)
        life_s = job.spec.deadline_at_s - now_s + self._bounds.ttl_s
        self._keys[job.spec.tenant, key.name] = (now_s + life_s, known)
        while len(self._keys) > 2 * self._bounds.max_jobs:
            self._keys.popitem(last=False)

    def _drop(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        self._due.pop(job_id, None)
        self._bell.ring(job_id)
