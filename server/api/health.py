"""``/healthz`` and ``/readyz``: for orchestrators and load balancers; they need no key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.schemas.health import AliveReply, ReadyReply
from server.services import Services


def routes(services: Services) -> APIRouter:
    """The two routes."""
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

    return router
