"""``/metrics``: one page for the whole application, in the format that the scraper asks for."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from server.auth import observer_of
from server.metrics_page import CONTENT_TYPES, format_for
from server.schemas.base import responses
from server.services import Services


def routes(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["operation"])

    @router.get(
        "/metrics",
        summary="Metrics of gateways, router and workers",
        response_class=Response,
        responses={
            200: {
                "description": "Prometheus text, or OpenMetrics with exemplars for whom accepts it",
                "content": {
                    kind.partition(";")[0]: {"schema": {"type": "string"}}
                    for kind in CONTENT_TYPES.values()
                },
            },
            **responses(401, 403),
        },
        dependencies=[Depends(observer_of)],
    )
    async def metrics(request: Request) -> Response:
        """The metrics of every gateway, router and worker that answers in time.

        Each sample carries its `replica`. Who accepts `application/openmetrics-text` gets that,
        with the id of a request as exemplar of each bucket of latency.

        `darkroom_replica_up` is 0 for a replica that answered lately and does not now. With
        authentication on, the scraper needs an operator's key.
        """
        wanted = format_for(request.headers.get("accept", ""))
        others = await services.dispatcher.metrics()
        page = services.metrics.page(others, format=wanted)
        return Response(page, headers={"content-type": CONTENT_TYPES[wanted], "vary": "accept"})

    return router
