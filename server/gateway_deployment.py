"""The gateway as a Ray Serve deployment: the HTTP application in a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from server.config import ServeConfig
from server.gateway import create_app
from server.http_server import HttpServer
from server.log_pipe import log_to
from server.messages import Readiness
from server.metrics import GatewayMetrics
from server.ray_dispatch import RayDispatcher
from server.serve_clients import ServeGatewaysClient, ServeRouterClient, ServeWorkersClient
from server.services import open_services

_LAST_REPLIES_S = 5.0
"""For replies that are on their way when everything behind them has ended."""


class Gateway:
    """Listens, and draws through the router and the workers.

    It listens before a worker is up, and says at ``/readyz`` that it is not ready.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ServeConfig,
        router: DeploymentHandle[Any],
        workers: DeploymentHandle[Any],
        log: Path | None = None,
    ) -> None:
        log_to(log, config.logging)
        self._drain_s = config.drain_timeout_s
        context = serve.get_replica_context()
        # In a thread: it asks Serve's controller and waits for the answer.
        gateways = await asyncio.to_thread(
            serve.get_deployment_handle, context.deployment, context.app_name
        )
        metrics = GatewayMetrics()
        self._dispatcher = RayDispatcher(
            config,
            ServeRouterClient(router),
            ServeWorkersClient(workers),
            gateways=ServeGatewaysClient(gateways),
            name=context.replica_tag,
            refused=lambda reason: metrics.gateway_refusals.labels(reason).inc(),
        )
        self._services = open_services(config, self._dispatcher, metrics=metrics)
        self._http = HttpServer(create_app(self._services), config.http)
        self._draining: asyncio.Task[None] | None = None
        self._dispatcher.start()
        await self._services.start()
        await self._http.start()

    async def readiness(self) -> Readiness:
        """Asked by whoever started the application."""
        return await self._dispatcher.readiness()

    async def metrics(
        self,
        *,
        replica: str,  # noqa: ARG002
    ) -> tuple[str, bytes]:
        """(this replica, its own metrics), asked by other gateways."""
        return self._services.metrics.own_page()

    async def drain(self) -> None:
        """Refuse what is new, finish what is in flight within the configured time, and close."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        await self._draining

    async def check_health(self) -> None:
        """Asked by Serve: a gateway that does not listen is replaced."""
        if not self._http.alive and self._draining is None:
            raise RuntimeError("the gateway does not listen any more")

    async def __del__(self) -> None:
        # Serve calls this before it ends the process, as in a roll-out.
        await self.drain()

    async def _drain(self) -> None:
        # In this order: jobs hand over what has not begun before it would be refused.
        await asyncio.gather(
            self._services.close(self._drain_s), self._dispatcher.close(self._drain_s)
        )
        await self._http.stop(_LAST_REPLIES_S)
        await self._services.flush()
