"""The OpenAI Images interface: pictures from a prompt, and pictures from pictures."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.jobs import base_url
from server.auth import Tenant, tenant_of
from server.disconnect import until_gone
from server.edits import inputs_of, read_edit
from server.image_stream import ImageStream, Kind
from server.ladder import admitted, drawing
from server.messages import Drawn
from server.openapi import edit_form
from server.orders import Order, model_named, order_of
from server.replies import TIMING_HEADERS, images_reply, timing_headers
from server.request_log import record_of
from server.schemas.base import responses
from server.schemas.openai import GenerationBody, ImagesReply
from server.services import Services
from server.sse import EventStream

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": (
            "The pictures; or with `stream` their events: `….partial_image` for each preview,"
            " `….completed` for each picture, and `error`, the last, where one failed"
        ),
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": TIMING_HEADERS,
    },
    **responses(401, 403, 404, 422, 503, 504),
}


def routes(services: Services) -> APIRouter:
    """The two routes."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post(
        "/generations",
        summary="Draw pictures from a prompt",
        response_model=ImagesReply,
        responses=_RESPONSES,
    )
    async def generations(
        body: GenerationBody, request: Request, tenant: Annotated[Tenant, Depends(tenant_of)]
    ) -> Response:
        """OpenAI's `images.generate`, with Darkroom's own fields beside the standard ones.

        A client that closes the connection cancels its pictures before their next step.
        """
        model = await model_named(services, body.model)
        request_id = record_of(request.scope).id
        order = order_of(body, model, services, tenant, request_id=request_id)
        return await _answer("image_generation", body, order, request, services)

    @router.post(
        "/edits",
        summary="Change a picture",
        response_model=ImagesReply,
        responses=_RESPONSES,
        openapi_extra={"requestBody": edit_form()},
    )
    async def edits(request: Request, tenant: Annotated[Tenant, Depends(tenant_of)]) -> Response:
        """OpenAI's `images.edit`: image to image, or inpainting with a mask.

        The mask repaints where it is transparent, as OpenAI's does; without transparency, where it
        is white. With `size: auto` the picture keeps its size, brought onto the model's grid and
        into its bounds; with another it is scaled to cover that, and cropped around the middle.
        """
        body, files = await read_edit(request)
        model = await model_named(services, body.model)
        inputs = await inputs_of(body, files, model, services.config.limits)
        request_id = record_of(request.scope).id
        order = order_of(body, model, services, tenant, request_id=request_id, inputs=inputs)
        return await _answer("image_edit", body, order, request, services)

    return router


async def _answer(
    kind: Kind, body: GenerationBody, order: Order, request: Request, services: Services
) -> Response:
    record = record_of(request.scope)
    tenant = order.tasks[0].tenant
    record.asked(
        tenant=tenant,
        model=order.model.id,
        prompt=body.prompt,
        user=body.safety_identifier or body.user,
    )
    if body.stream:
        found = await until_gone(
            request.receive,
            admitted(
                services.dispatcher,
                order,
                degrade=body.degrade,
                previews=body.partial_images or 0,
            ),
        )
        stream = ImageStream(
            kind=kind,
            body=body,
            admitted=found,
            record=record,
            metrics=services.metrics,
            tenant=tenant,
            began_s=time.monotonic(),
        )
        return EventStream(stream.events(), sources=[found])

    async def draw() -> tuple[Order, list[Drawn]]:
        async with drawing(services.dispatcher, order, degrade=body.degrade) as found:
            return found.order, await found.pictures()

    order_drawn, pictures = await until_gone(request.receive, draw())
    record.drew(pictures)
    services.metrics.drew(pictures, tenant=tenant, request_id=record.id)
    urls: list[str] = []
    if body.response_format == "url":
        prefix = base_url(request, services)
        paths = await services.jobs.links.publish(tenant, pictures)
        urls = [prefix + path for path in paths]
    reply = images_reply(body, order_drawn, pictures, urls)
    return Response(
        reply.model_dump_json(), headers=timing_headers(pictures), media_type="application/json"
    )
