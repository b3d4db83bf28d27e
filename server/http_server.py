"""Uvicorn inside a running event loop, on a port that several processes may share."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

from engine.errors import BackendUnavailableError
from server.config import HttpConfig
from server.listener import uvicorn_config

_BACKLOG = 2048


class HttpServer:
    """Serves ``app`` in this process, without Serve's proxy in front.

    The proxy would cost a hop and a process, read whole uploads before anybody can refuse them,
    and answer overload in its own words. With SO_REUSEPORT the gateways of a machine share one
    port, and old and new ones coexist while a new version rolls out.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._config = config
        self._server = uvicorn.Server(uvicorn_config(app, config, backlog=_BACKLOG))
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind, listen and serve.

        Raises:
            BackendUnavailableError: the address cannot be bound.
        """
        listener = _listener(self._config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._serving is not None and not self._serving.done()

    async def stop(self, timeout_s: float) -> None:
        """Close the port, let open replies end for ``timeout_s`` seconds, and cut the rest."""
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


def _listener(config: HttpConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        raise BackendUnavailableError(
            f"cannot listen on {config.host}:{config.port}: {error}"
        ) from error
    return listener
