"""Jobs and their events as replies."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from engine.errors import DarkroomError
from server.errors import body_of
from server.jobs.records import FINAL, Job, JobEvent
from server.replies import usage_of
from server.schemas.base import ErrorDetail
from server.schemas.draw import DrawnReply
from server.schemas.jobs import JobPictureReply, JobReply
from server.services import Services
from server.sizes import text_of
from server.sse import ServerEvent


async def job_reply(job: Job, services: Services, *, inline: bool | None = None) -> JobReply:
    """A job, with fresh links to its pictures.

    Args:
        inline: whether pictures are in the reply as well; by default as the job was asked for.
    """
    spec, state = job.spec, job.state
    inline = spec.inline if inline is None else inline
    finished_at_s = state.finished_at_s
    ttl_s = services.config.jobs.ttl_s
    return JobReply(
        id=spec.id,
        status=state.status,
        cancelling=job.cancelling and not state.final,
        created_at=int(spec.created_at_s),
        started_at=None if state.started_at_s is None else int(state.started_at_s),
        finished_at=None if finished_at_s is None else int(finished_at_s),
        expires_at=None if finished_at_s is None else int(finished_at_s + ttl_s),
        model=spec.model,
        n=len(spec.seeds),
        size=text_of((spec.width_px, spec.height_px)),
        output_format=spec.output.format,
        usage=usage_of(spec.rows),
        attempts=state.attempts,
        data=[
            await _picture(job, index, services, inline=inline) for index in sorted(state.done())
        ],
        error=None if state.error is None else ErrorDetail.model_validate(state.error),
    )


async def _picture(job: Job, index: int, services: Services, *, inline: bool) -> JobPictureReply:
    spec = job.spec
    encoded: str | None = None
    if inline:
        picture = await services.jobs.picture(spec.tenant, spec.id, index)
        encoded = base64.b64encode(picture.data).decode()
    path = await services.jobs.links.path(spec.id, index, spec.output.format)
    return JobPictureReply(
        index=index,
        url=spec.base_url + path,
        b64_json=encoded,
        darkroom=DrawnReply.model_validate(job.state.pictures[str(index)]),
    )


async def events_of(job: Job, after: int, services: Services) -> AsyncGenerator[ServerEvent, None]:
    """Every event of a job, and an error as the last where the store stays away."""
    try:
        async with aclosing(services.jobs.follow(job.spec.id, after)) as pieces:
            async for piece in pieces:
                latest = {event.data.get("index"): event for event in piece}
                for event in piece:
                    newest = latest[event.data.get("index")] is event
                    yield await _event(job, event, services, newest=newest)
    except DarkroomError as error:
        yield ServerEvent(event="error", data=body_of(error))


async def _event(job: Job, event: JobEvent, services: Services, *, newest: bool) -> ServerEvent:
    data: dict[str, Any] = dict(event.data)
    name = event.name
    if name in FINAL:
        name = "done"
        ended = await services.jobs.job(job.spec.tenant, job.spec.id)
        data = (await job_reply(ended, services, inline=False)).model_dump()
    elif name == "picture":
        path = await services.jobs.links.path(job.spec.id, data["index"], job.spec.output.format)
        data = {"index": data["index"], "url": job.spec.base_url + path, "darkroom": data}
    elif name == "progress" and data.pop("preview") and newest:
        preview = await services.jobs.store.preview(job.spec.id, data["index"])
        if preview is not None and preview.step == data["step"]:
            data["preview_b64"] = base64.b64encode(preview.data).decode()
    return ServerEvent(event=name, data=data, id=str(event.number))
