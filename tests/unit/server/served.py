"""The HTTP stack over a scripted dispatcher, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from loadtests.server_processes import free_port
from server.config import ServeConfig
from server.gateway import create_app
from server.http_server import HttpServer
from tests.unit.server.scripted import ScriptedDispatcher, services_of


@contextmanager
def served(dispatcher: ScriptedDispatcher, config: ServeConfig | None = None) -> Iterator[str]:
    """Listens in a thread while the block runs; gives the URL."""
    config = config or ServeConfig()
    http = config.http.model_copy(update={"port": free_port()})
    started: Future[None] = Future()
    stop = threading.Event()

    async def serve() -> None:
        server = HttpServer(create_app(services_of(dispatcher, config)), http)
        await server.start()
        started.set_result(None)
        await asyncio.to_thread(stop.wait)
        await server.stop(0.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        started.result(60)
        yield f"http://{http.host}:{http.port}"
    finally:
        stop.set()
        thread.join(60)
