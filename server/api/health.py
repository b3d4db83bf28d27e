"""For orchestrators and load balancers; no key is needed, and no rate counts these requests.

``/healthz`` and ``/readyz``; and ``/-/healthz`` and ``/-/routes``, which Ray Serve's own proxy
would answer. That proxy is off here, but KubeRay's readiness probe and operator ask the serve port
for them all the same.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from server.schemas.health import AliveReply, ReadyReply
from server.services import Services

APPLICATION = "darkroom"
"""The name of the application in Ray Serve; it is mounted at ``/``."""
_DRAINING = "This node is being drained."  # as Serve's proxy says it


def routes(services: Services) -> APIRouter:
    """The four routes; those of Serve's proxy are not part of the documented interface."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Is the gateway alive")
    async def alive() -> AliveReply:
        """Answers as long as the process can answer. Restart it when this fails."""
        return AliveReply()

    @router.get(
        "/readyz",
        summary="Is every model warm",
        responses={
            503: {"model": ReadyReply, "description": "Not yet, or draining: send nothing here"},
        },
    )
    async def ready() -> ReadyReply:
        """200 once every configured model is warm on a worker; 503 before, and while draining."""
        found = await services.dispatcher.readiness()
        reply = ReadyReply(
            ready=found.ready and not found.draining,
            workers=found.workers,
            missing=list(found.missing),
            draining=found.draining,
        )
        # The model of the reply is the same either way; only the status tells them apart.
        if not reply.ready:
            return JSONResponse(reply.model_dump(), 503)  # type: ignore[return-value]
        return reply

    @router.get("/-/healthz", include_in_schema=False)
    async def serve_health() -> Response:
        """`success`; while draining 503, so that KubeRay takes the pod out of its Service."""
        if (await services.dispatcher.readiness()).draining:
            return PlainTextResponse(_DRAINING, 503)
        return PlainTextResponse("success")

    @router.get("/-/routes", include_in_schema=False)
    async def serve_routes() -> Response:
        """The route prefix of the one application, by its name in Serve."""
        if (await services.dispatcher.readiness()).draining:
            return PlainTextResponse(_DRAINING, 503)
        return JSONResponse({"/": APPLICATION})

    return router
