"""Jobs: pictures in the background, with events, webhooks and links."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import Response

from engine.errors import InvalidRequestError
from server.auth import Tenant, tenant_of
from server.job_replies import events_of, job_reply
from server.jobs.records import JobPicture, JobSpec, WebhookTarget, pack
from server.jobs.store import IdempotencyKey
from server.orders import Order, model_named, order_of
from server.request_log import record_of
from server.schemas.base import responses
from server.schemas.jobs import JobBody, JobList, JobReply
from server.services import Services
from server.sse import EventStream

JobId = Annotated[str, Path(pattern=r"^job-[0-9a-f]{32}$")]
CallingTenant = Annotated[Tenant, Depends(tenant_of)]

_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture",
        "content": {f"image/{name}": {} for name in ("png", "jpeg", "webp")},
    }
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": (
            "`queued` with the position, `started`, `progress` for each step (with `preview_b64`"
            " where it is the latest preview), `picture` for each finished one, `resumed` after the"
            " loss of a gateway, and at last `done` with the job"
        ),
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    204: {"description": "The job is done, and the client has heard of it: do not reconnect"},
}


def routes(services: Services) -> APIRouter:
    """The routes of jobs and of the links to pictures."""
    router = APIRouter(tags=["jobs"])
    jobs = services.jobs

    @router.post(
        "/v1/jobs",
        status_code=202,
        response_model=JobReply,
        summary="Draw pictures in the background",
        responses=responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503),
    )
    async def create_job(
        body: JobBody,
        request: Request,
        response: Response,
        tenant: CallingTenant,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
        ] = None,
    ) -> JobReply:
        """The same body as `/v1/images/generations`, and what only jobs have.

        With an `Idempotency-Key`, the same key and body make one job, however often they are sent;
        `Idempotency-Replayed: true` says that it was there. The same key with another body is 409.
        """
        if body.stream:
            raise InvalidRequestError(
                "a job is followed at /v1/jobs/{id}/events; stream does not apply", field="stream"
            )
        hook: WebhookTarget | None = None
        if body.webhook is not None:
            hook = WebhookTarget(url=body.webhook.url, secret=body.webhook.secret)
            jobs.check_webhook(hook)
        model = await model_named(services, body.model)
        record = record_of(request.scope)
        order = order_of(body, model, services, tenant, request_id=record.id)
        record.asked(
            tenant=tenant.id,
            model=model.id,
            prompt=body.prompt,
            user=body.safety_identifier or body.user,
        )
        order = order.with_previews(body.partial_images or 0)
        spec = _spec(body, order, hook, base_url(request, services), services.config.jobs.ttl_s)
        key = None if idempotency_key is None else _key(idempotency_key, body)
        job, replayed = await jobs.submit(spec, key)
        response.headers["location"] = f"/v1/jobs/{job.spec.id}"
        if replayed:
            response.headers["idempotency-replayed"] = "true"
        return await job_reply(job, services)

    @router.get(
        "/v1/jobs",
        response_model=JobList,
        summary="List jobs",
        responses=responses(400, 401, 404, 429, 500, 503),
    )
    async def list_jobs(
        tenant: CallingTenant,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(pattern=r"^job-[0-9a-f]{32}$")] = None,
    ) -> JobList:
        """The key's tenant's own, the newest first; pictures are linked, never inline."""
        found = await jobs.jobs(tenant.id, limit + 1, after)
        replies = [await job_reply(job, services, inline=False) for job in found[:limit]]
        return JobList(data=replies, has_more=len(found) > limit)

    @router.get(
        "/v1/jobs/{id}",
        response_model=JobReply,
        summary="How far a job is",
        responses=responses(400, 401, 404, 429, 500, 503),
    )
    async def get_job(id: JobId, tenant: CallingTenant) -> JobReply:
        """With links to the pictures that are finished."""
        return await job_reply(await jobs.job(tenant.id, id), services)

    @router.delete(
        "/v1/jobs/{id}",
        response_model=JobReply,
        summary="Cancel or forget a job",
        responses=responses(400, 401, 404, 429, 500, 503),
    )
    async def delete_job(id: JobId, tenant: CallingTenant) -> JobReply:
        """Ends an unfinished job before its next step; its events say when it has ended.

        Of a finished one, everything that is kept is deleted. The reply is the job as it was.
        """
        job = await jobs.cancel(tenant.id, id)
        return await job_reply(job, services, inline=False)

    @router.get(
        "/v1/jobs/{id}/images/{index}",
        summary="A finished picture",
        response_class=Response,
        responses={**_PICTURE, **responses(400, 401, 404, 429, 500, 503)},
    )
    async def get_job_image(
        id: JobId, index: Annotated[int, Path(ge=0, le=1000)], tenant: CallingTenant
    ) -> Response:
        """There as soon as it is drawn, also while others of the job are not."""
        return _file(await jobs.picture(tenant.id, id, index))

    @router.get(
        "/v1/jobs/{id}/events",
        summary="What happens to a job",
        response_class=Response,
        responses={**_EVENTS, **responses(400, 401, 404, 429, 500, 503)},
    )
    async def job_events(
        id: JobId,
        tenant: CallingTenant,
        last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,12}$")] = None,
    ) -> Response:
        """Server-sent events from the beginning, or from after `Last-Event-ID`.

        A client that closes the connection changes nothing about the job.
        """
        job = await jobs.job(tenant.id, id)
        after = int(last_event_id or 0)
        if job.state.final and after and not await jobs.store.events(id, after, limit=1):
            return Response(status_code=204)
        return EventStream(events_of(job, after, services), retry_ms=1000)

    @router.get(
        "/v1/files/{id}/{name}",
        summary="A picture by its link",
        response_class=Response,
        responses={**_PICTURE, **responses(400, 403, 404, 500, 503)},
    )
    async def get_file(
        id: Annotated[str, Path(max_length=64)],
        name: Annotated[str, Path(max_length=32)],
        expires: Annotated[int, Query(ge=0, le=10**11)],
        signature: Annotated[str, Query(max_length=64)],
    ) -> Response:
        """Links come in replies. They need no key, and work for a while."""
        return _file(await jobs.links.open(id, name, expires, signature))

    return router


def base_url(request: Request, services: Services) -> str:
    """What links begin with: what is configured, or what the client called."""
    return (services.config.http.public_url or str(request.base_url)).rstrip("/")


def _spec(
    body: JobBody, order: Order, hook: WebhookTarget | None, base: str, ttl_s: float
) -> JobSpec:
    now_s = time.time()
    first = order.tasks[0]
    return JobSpec(
        id=f"job-{uuid.uuid4().hex}",
        tenant=first.tenant,
        created_at_s=now_s,
        # Nobody waits at the other end: a job that names no deadline has as long as it is kept.
        deadline_at_s=now_s + (body.deadline_s or ttl_s),
        model=order.model.id,
        request=pack(first.request),
        seeds=tuple(task.request.seed or 0 for task in order.tasks),
        output=first.output,
        width_px=order.width_px,
        height_px=order.height_px,
        rows=order.rows,
        base_url=base,
        inline=body.response_format == "b64_json",
        webhook=hook,
    )


def _key(name: str, body: JobBody) -> IdempotencyKey:
    """Bodies are the same when they say the same, however they are written."""
    said = json.dumps(body.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return IdempotencyKey(name, hashlib.sha256(said.encode()).hexdigest())


def _file(picture: JobPicture) -> Response:
    return Response(
        picture.data,
        media_type=f"image/{picture.format}",
        headers={
            "cache-control": "private, max-age=3600, immutable",
            "content-disposition": f'inline; filename="{picture.index}.{picture.format}"',
        },
    )
