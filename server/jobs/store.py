"""The seam between jobs and where they are kept: one protocol, two implementations.

Who runs a job is its *owner*, a gateway process by a name that no other process will ever have.
Owners show that they live by a beat. A job whose owner has missed its beats is an orphan, and the
first gateway that asks adopts it. Every write names its owner and is refused when the job has
another one by then, so that a gateway that was only asleep can do no harm when it wakes up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import OverloadedError
from server.config import JobsConfig
from server.errors import ServerError
from server.jobs.records import Change, Job, JobEvent, JobPicture, JobPreview


class JobLostError(ServerError):
    """The job has another owner by now, or is done; whoever draws it should stop."""


class JobGoneError(ServerError):
    """The store does not know the job (any more)."""


class JobsFullError(OverloadedError):
    """As many unfinished jobs as the configuration allows are there already."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client's name for one request, and the digest of that request's body."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Known:
    """The idempotency key was used before: for this job, with a body of this digest."""

    job_id: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a store holds at most.

    Attributes:
        ttl_s: how long finished jobs are kept.
        max_jobs: unfinished ones, and as many finished ones.
        max_bytes: of pictures; the oldest finished jobs go first.
    """

    ttl_s: float = 3600.0
    max_jobs: int = 10_000
    max_bytes: int = 512 << 20

    @classmethod
    def of(cls, config: JobsConfig) -> Bounds:
        """As configured."""
        return cls(ttl_s=config.ttl_s, max_jobs=config.max_jobs, max_bytes=config.max_bytes)


class JobStore(Protocol):
    """Keeps jobs, their events and their pictures for a while.

    Every method may raise ``JobsUnavailableError`` when the store does not answer.
    """

    async def start(self) -> None:
        """Begin to listen for news."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...

    # ---------------------------------------------------------------- anybody

    async def create(self, job: Job, key: IdempotencyKey | None = None) -> Known | None:
        """Keep a new job, unless ``key`` was used before; then say for which.

        Raises:
            JobsFullError: too many unfinished jobs.
        """
        ...

    async def job(self, job_id: str) -> Job | None:
        """A job by its id."""
        ...

    async def jobs(self, tenant: str, limit: int, before: str | None = None) -> Sequence[Job]:
        """A tenant's listed jobs, the newest first; with ``before``, those older than that job."""
        ...

    async def events(self, job_id: str, after: int, limit: int = 256) -> Sequence[JobEvent]:
        """Events with numbers above ``after``, in order."""
        ...

    async def heard(self, job_id: str, timeout_s: float) -> None:
        """Return when something may have changed about the job, at the latest after ``timeout_s``.

        May return early, and may miss changes: read, then wait, then read again.
        """
        ...

    async def picture(self, job_id: str, index: int) -> JobPicture | None:
        """A finished picture."""
        ...

    async def preview(self, job_id: str, index: int) -> JobPreview | None:
        """The latest preview of a picture."""
        ...

    async def cancel(self, job_id: str) -> None:
        """Ask the owner to end the job. Of a job that is done or gone: nothing."""
        ...

    async def forget(self, job_id: str) -> None:
        """Drop a finished job with all that it holds. Of any other: nothing."""
        ...

    async def secret(self) -> bytes:
        """32 random bytes that every gateway of this store shares."""
        ...

    # ---------------------------------------------------------------- owners

    async def write(self, job: Job, change: Change) -> bool:
        """Add to what ``job.owner`` owns; a final state ends it, and files its webhook as due.

        Returns:
            Whether somebody asked to cancel it.

        Raises:
            JobLostError, JobGoneError: nothing was written.
        """
        ...

    async def restore(self, job: Job) -> None:
        """Keep a job again that a store has lost while its owner still draws it."""
        ...

    async def beat(self, owner: str, alive_s: float) -> None:
        """Say that ``owner`` lives, and will have said so again within ``alive_s`` seconds."""
        ...

    async def leave(self, owner: str) -> None:
        """Say that ``owner`` ends: its unfinished jobs are orphans at once."""
        ...

    async def adopt(
        self, owner: str, limit: int, running: Collection[str] | None = None
    ) -> Sequence[Job]:
        """Take over up to ``limit`` orphans; their attempts are counted.

        With ``running``, also jobs of ``owner`` itself that are not among these: it made or adopted
        them, and never heard so. These are no new attempt.
        """
        ...

    async def sweep(self) -> None:
        """Drop what is past its time or over the bounds."""
        ...

    # ---------------------------------------------------------------- webhooks

    async def due_webhook(self, busy_s: float) -> tuple[Job, int] | None:
        """A finished job whose webhook is due, and how often it was tried before.

        Nobody else gets it for ``busy_s`` seconds; by then it must be put off or settled.
        """
        ...

    async def put_off_webhook(self, job_id: str, seconds: float) -> None:
        """Try again later."""
        ...

    async def settle_webhook(self, job_id: str) -> None:
        """Never try again."""
        ...
