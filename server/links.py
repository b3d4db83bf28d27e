"""Links to pictures that work for a while, for whoever has them, without a key.

A link names the picture and the time at which it stops working, and carries an HMAC-SHA256 over
both. The secret is drawn once for each deployment and kept in the store of jobs: behind a shared
Redis every gateway accepts every other's links; in memory they end with the process.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import uuid
from collections.abc import Callable, Sequence
from typing import get_args

from server.errors import ForbiddenError, NotFoundError
from server.jobs.records import Change, Job, JobPicture, JobSpec, JobState
from server.jobs.store import JobStore
from server.messages import Drawn, PictureFormat

_NAME = re.compile(rf"(\d{{1,4}})\.({'|'.join(get_args(PictureFormat))})")


class Links:
    """Signs links and answers them.

    Args:
        ttl_s: how long a link works; the picture itself may go earlier, with its job.
        now_s: Unix time.
    """

    def __init__(self, store: JobStore, *, ttl_s: float, now_s: Callable[[], float]) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._now_s = now_s

    async def path(self, job_id: str, index: int, format_: PictureFormat) -> str:
        """Path and query of a link to a picture.

        Raises:
            JobsUnavailableError: the secret is not known yet, and the store is away.
        """
        expires_at_s = int(self._now_s() + self._ttl_s)
        name = f"{index}.{format_}"
        signature = _signature(await self._store.secret(), job_id, name, expires_at_s)
        return f"/v1/files/{job_id}/{name}?expires={expires_at_s}&signature={signature}"

    async def open(self, job_id: str, name: str, expires_at_s: int, signature: str) -> JobPicture:
        """The picture that a link names.

        Raises:
            ForbiddenError: signed by somebody else, or no longer valid.
            NotFoundError: the link is good, but its picture is gone.
            JobsUnavailableError: the store is away.
        """
        expected = _signature(await self._store.secret(), job_id, name, expires_at_s)
        valid = hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))
        if not valid or self._now_s() >= expires_at_s:
            raise ForbiddenError("the link is not valid, or no longer")
        found = _NAME.fullmatch(name)
        picture = await self._store.picture(job_id, int(found[1])) if found else None
        if picture is None:
            raise NotFoundError("the picture of this link is gone")
        return picture

    async def publish(self, tenant: str, pictures: Sequence[Drawn]) -> list[str]:
        """Keep pictures that no job drew, and link to them.

        Returns:
            Path and query of each link, in the order of ``pictures``.

        Raises:
            JobsUnavailableError, JobsFullError: as the store says.
        """
        now_s = self._now_s()
        spec = JobSpec(
            id=f"file-{uuid.uuid4().hex}",
            tenant=tenant,
            created_at_s=now_s,
            deadline_at_s=now_s + self._ttl_s,
            model=pictures[0].model,
            request={},
            seeds=tuple(picture.seed for picture in pictures),
            width_px=pictures[0].width_px,
            height_px=pictures[0].height_px,
            rows=0,
            listed=False,
        )
        job = Job(spec=spec, state=JobState(), owner=spec.id)  # its own: nothing is left to draw
        await self._store.create(job)
        kept = tuple(
            JobPicture(index, picture.format, picture.data)
            for index, picture in enumerate(pictures)
        )
        state = JobState(status="succeeded", finished_at_s=now_s)
        await self._store.write(job, Change(state=state, pictures=kept))
        return [await self.path(spec.id, item.index, item.format) for item in kept]


def _signature(secret: bytes, job_id: str, name: str, expires_at_s: int) -> str:
    text = f"darkroom-link-v1\n{job_id}\n{name}\n{expires_at_s}".encode()
    digest = hmac.new(secret, text, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
