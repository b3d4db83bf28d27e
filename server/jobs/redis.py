"""Jobs on a Redis that all gateways share (7.0 and newer, no modules).

A gateway may die, or Redis may restart, between any two calls. Nothing here is connected before
its first use, every call has a timeout, and a call that fails says ``JobsUnavailableError``.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, cast

from redis.exceptions import RedisError

from server.config import RedisTlsConfig
from server.errors import JobsUnavailableError
from server.jobs import scripts
from server.jobs.records import (
    MAX_EVENTS,
    Change,
    Job,
    JobEvent,
    JobPicture,
    JobPreview,
    spec_json,
    state_json,
)
from server.jobs.redis_client import answering, connect, key
from server.jobs.redis_news import News
from server.jobs.redis_values import FIELDS, blob_keys, event_of, job_of
from server.jobs.store import (
    Bounds,
    IdempotencyKey,
    JobGoneError,
    JobLostError,
    JobsFullError,
    Known,
)

_SWEEP = 100


class RedisJobStore:
    """Implements :class:`server.jobs.store.JobStore` on Redis.

    Args:
        timeout_s: of each call, connecting included; a call is tried at most three times.
        tls: of a ``rediss://`` address.
        now_s: Unix time, which gateways should agree on to a second or so.
    """

    def __init__(
        self,
        url: str,
        bounds: Bounds,
        *,
        timeout_s: float,
        now_s: Callable[[], float],
        tls: RedisTlsConfig | None = None,
    ) -> None:
        self._redis = connect(url, timeout_s, tls)
        self._bounds = bounds
        self._now_s = now_s
        self._news = News(self._redis)
        self._secret: bytes | None = None

    async def start(self) -> None:
        """Listen for other gateways' news."""
        self._news.start()

    async def close(self) -> None:
        """Let go of all connections."""
        await self._news.close()
        with suppress(RedisError, OSError):
            await self._redis.connection_pool.disconnect()
            await self._redis.aclose()

    # ---------------------------------------------------------------- anybody

    async def create(self, job: Job, key_: IdempotencyKey | None = None) -> Known | None:
        """See :class:`JobStore`."""
        spec = job.spec
        name = "" if key_ is None else hashlib.sha256(key_.name.encode()).hexdigest()
        keys = [
            key("job", spec.id),
            key("key", spec.tenant, name),
            key("unfinished"),
            key("tenant", spec.tenant),
        ]
        arguments: list[Any] = [spec.id, spec_json(spec), state_json(job.state), job.owner]
        arguments += [spec.created_at_s, self._bounds.max_jobs, self._life_ms(job)]
        arguments += ["" if key_ is None else key_.digest, int(spec.listed)]
        said = await self._run(scripts.CREATE, keys, arguments)
        if said[0] == b"full":
            raise JobsFullError(f"{self._bounds.max_jobs} jobs are unfinished, which is the bound")
        if said[0] == b"made":
            return None
        job_id, _, digest = said[1].decode().partition(" ")
        # Our own, where the first answer was lost and the client asked again.
        return None if job_id == spec.id else Known(job_id, digest)

    async def job(self, job_id: str) -> Job | None:
        """See :class:`JobStore`."""
        with answering():
            found = await self._redis.hmget(key("job", job_id), FIELDS)
        return job_of(found)

    async def jobs(self, tenant: str, limit: int, before: str | None = None) -> Sequence[Job]:
        """See :class:`JobStore`."""
        mine = key("tenant", tenant)
        found: list[Job] = []
        with answering():
            rank = None if before is None else await self._redis.zrevrank(mine, before)
            first = 0 if rank is None else rank + 1
            while len(found) < limit:
                ids = await self._redis.zrevrange(mine, first, first + limit - 1)
                if not ids:
                    break
                first += len(ids)
                async with self._redis.pipeline(transaction=False) as pipe:
                    for job_id in ids:
                        pipe.hmget(key("job", job_id.decode()), FIELDS)
                    jobs = [job_of(values) for values in await pipe.execute()]
                if gone := [job_id for job_id, job in zip(ids, jobs, strict=True) if job is None]:
                    first -= await self._redis.zrem(mine, *gone)
                found += [job for job in jobs if job is not None]
        return found[:limit]

    async def events(self, job_id: str, after: int, limit: int = 256) -> Sequence[JobEvent]:
        """See :class:`JobStore`."""
        with answering():
            entries = await self._redis.xrange(
                key("events", job_id), min=f"({after}-0", max="+", count=limit
            )
        return [event_of(number, fields) for number, fields in entries]

    async def heard(self, job_id: str, timeout_s: float) -> None:
        """See :class:`JobStore`."""
        await self._news.wait(job_id, timeout_s)

    async def picture(self, job_id: str, index: int) -> JobPicture | None:
        """See :class:`JobStore`."""
        found = await self._blob("picture", job_id, index)
        return None if found is None else JobPicture(index, cast(Any, found[0]), found[1])

    async def preview(self, job_id: str, index: int) -> JobPreview | None:
        """See :class:`JobStore`."""
        found = await self._blob("preview", job_id, index)
        return None if found is None else JobPreview(index, int(found[0]), found[1])

    async def cancel(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        if await self._run(scripts.CANCEL, [key("job", job_id)], []):
            await self._news.tell(job_id)

    async def forget(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        job = await self.job(job_id)
        keys = [key(kind) for kind in ("finished", "held", "sizes", "webhooks", "tries")]
        keys += [key("job", job_id), key("events", job_id)]
        if job is not None:
            keys += blob_keys(job)
        if await self._run(scripts.FORGET, keys, [job_id]):
            await self._news.tell(job_id)

    async def secret(self) -> bytes:
        """See :class:`JobStore`."""
        if self._secret is None:
            with answering():
                await self._redis.set(key("secret"), secrets.token_bytes(32), nx=True)
                found: bytes | None = await self._redis.get(key("secret"))
            if found is None:
                raise JobsUnavailableError("the store of jobs lost its secret; try again")
            self._secret = found
        return self._secret

    # ---------------------------------------------------------------- owners

    async def write(self, job: Job, change: Change) -> bool:
        """See :class:`JobStore`."""
        job_id, count, final = job.spec.id, len(job.spec.seeds), change.state.final
        kinds = ("unfinished", "finished", "webhooks", "held", "sizes")
        keys = [key("job", job_id), key("events", job_id), *map(key, kinds), *blob_keys(job)]
        arguments: list[Any] = [job_id, job.owner, self._now_s(), self._life_ms(job, final=final)]
        arguments += [MAX_EVENTS, state_json(change.state), int(final)]
        arguments += [int(job.spec.webhook is not None), count, len(change.events), key("news")]
        for event in change.events:
            arguments += [event.number, event.name, json.dumps(event.data)]
        for picture in change.pictures:
            arguments += [picture.index + 1, picture.format.encode() + b"\n" + picture.data]
        for preview in () if final else change.previews:
            arguments += [count + preview.index + 1, b"%d\n" % preview.step + preview.data]
        said = await self._run(scripts.WRITE, keys, arguments)
        if said[0] == b"gone":
            raise JobGoneError("the store does not know the job")
        if said[0] == b"lost":
            raise JobLostError("the job has another owner, or is done")
        self._news.ring(job_id)
        if final:
            await self.sweep()
        return bool(said[1] == b"1")

    async def restore(self, job: Job) -> None:
        """See :class:`JobStore`."""
        spec = job.spec
        keys = [key("job", spec.id), key("unfinished"), key("tenant", spec.tenant)]
        arguments: list[Any] = [spec.id, spec_json(spec), state_json(job.state), job.owner]
        arguments += [spec.created_at_s, self._life_ms(job), job.state.attempts]
        arguments += [int(job.cancelling), 0, int(spec.listed)]
        await self._run(scripts.RESTORE, keys, arguments)

    async def beat(self, owner: str, alive_s: float) -> None:
        """See :class:`JobStore`."""
        with answering():
            await self._redis.set(key("beat", owner), b"1", px=int(alive_s * 1000))
            if self._secret is not None:  # a Redis that came back empty: links go on working
                await self._redis.set(key("secret"), self._secret, nx=True)

    async def leave(self, owner: str) -> None:
        """See :class:`JobStore`."""
        with answering():
            await self._redis.delete(key("beat", owner))

    async def adopt(
        self, owner: str, limit: int, running: Collection[str] | None = None
    ) -> Sequence[Job]:
        """See :class:`JobStore`."""
        adopted: list[str] = []
        for job_id, old in await self._orphans(owner):
            if len(adopted) == limit:
                break
            keys = [key("job", job_id), key("unfinished"), key("beat", old)]
            if old == owner:
                mine = running is not None and job_id not in running
            else:
                mine = bool(await self._run(scripts.ADOPT, keys, [job_id, old, owner]))
            if mine:
                adopted.append(job_id)
        found = [await self.job(job_id) for job_id in adopted]
        return [job for job in found if job is not None and not job.state.final]

    async def sweep(self) -> None:
        """See :class:`JobStore`."""
        before_s = self._now_s() - self._bounds.ttl_s
        with answering():
            oldest = await self._redis.zrange(key("finished"), 0, _SWEEP - 1, withscores=True)
            count = await self._redis.zcard(key("finished"))
            held = int(await self._redis.get(key("held")) or 0)
            sizes = await self._redis.hmget(key("sizes"), [i for i, _ in oldest]) if oldest else []
        for (job_id, ended_at_s), size in zip(oldest, sizes, strict=True):
            over = count > self._bounds.max_jobs or held > self._bounds.max_bytes
            if not over and ended_at_s > before_s:
                break
            await self.forget(job_id.decode())
            count -= 1
            held -= int(size or 0)

    # ---------------------------------------------------------------- webhooks

    async def due_webhook(self, busy_s: float) -> tuple[Job, int] | None:
        """See :class:`JobStore`."""
        now_s = self._now_s()
        keys = [key("webhooks"), key("tries")]
        while said := await self._run(scripts.DUE, keys, [now_s, now_s + busy_s]):
            job_id = said[0].decode()
            job = await self.job(job_id)
            if job is not None:
                return job, int(said[1])
            await self.settle_webhook(job_id)  # its time ran out before it was told
        return None

    async def put_off_webhook(self, job_id: str, seconds: float) -> None:
        """See :class:`JobStore`."""
        with answering():
            await self._redis.zadd(key("webhooks"), {job_id: self._now_s() + seconds}, xx=True)

    async def settle_webhook(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        with answering():
            await self._redis.zrem(key("webhooks"), job_id)
            await self._redis.hdel(key("tries"), job_id)

    # ---------------------------------------------------------------- helpers

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        with answering():
            return await self._redis.register_script(script)(keys=keys, args=arguments)

    async def _blob(self, kind: str, job_id: str, index: int) -> tuple[str, bytes] | None:
        with answering():
            value = await self._redis.get(key(kind, job_id, str(index)))
        if value is None:
            return None
        label, _, data = value.partition(b"\n")
        return label.decode(), data

    async def _orphans(self, owner: str) -> list[tuple[str, str]]:
        """(job, owner) of unfinished jobs without a living owner, and of ``owner``'s own.

        The oldest first; the owner is ``""`` where the job is gone.
        """
        with answering():
            ids = await self._redis.zrange(key("unfinished"), 0, -1)
            async with self._redis.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hget(key("job", job_id.decode()), "owner")
                owners = [(value or b"").decode() for value in await pipe.execute()]
            others = sorted(set(owners) - {owner})
            async with self._redis.pipeline(transaction=False) as pipe:
                for other in others:
                    pipe.exists(key("beat", other))
                alive = dict(zip(others, await pipe.execute(), strict=True))
        pairs = zip((job_id.decode() for job_id in ids), owners, strict=True)
        return [(job_id, old) for job_id, old in pairs if old == owner or not alive[old]]

    def _life_ms(self, job: Job, *, final: bool = False) -> int:
        """How long Redis keeps what belongs to the job from now on."""
        left_s = 0.0 if final else max(0.0, job.spec.deadline_at_s - self._now_s())
        return int((left_s + self._bounds.ttl_s) * 1000)
