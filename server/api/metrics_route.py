"""``/metrics``: one page for the whole application, in Prometheus's text format."""

from __future__ import annotations

import os
import socket

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.auth import observer_of
from server.schemas.base import responses
from server.services import Services


def routes(services: Services) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["operation"])
    # Two gateways of one machine share the host's name, two of a cluster may share the number.
    own_name = f"gateway-{socket.gethostname()}-{os.getpid()}"

    @router.get(
        "/metrics",
        summary="Metrics of gateways, router and workers",
        response_class=Response,
        responses={
            200: {
                "description": "Prometheus text; each sample carries its `replica`",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **responses(401, 403),
        },
        dependencies=[Depends(observer_of)],
    )
    async def metrics() -> Response:
        """This gateway's metrics, and those of every router and worker that answers in time.

        `darkroom_replica_up` is 0 for a replica that answered lately and does not now. With
        authentication on, the scraper needs an operator's key.
        """
        page = services.metrics.page(own_name, await services.dispatcher.metrics())
        return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})

    return router
