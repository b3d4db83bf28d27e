"""The whole HTTP application over an engine in this process, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from server.config import ServeConfig
from server.gateway import create_app
from server.http_server import HttpServer
from server.local import LocalDispatcher
from server.services import open_services
from server.settings import Settings
from server.worker_core import WorkerCore

START_TIMEOUT_S = 900.0  # the first to start compiles the model, on a machine that may be busy
STOP_TIMEOUT_S = 60.0


@contextmanager
def listening(config: ServeConfig, settings: Settings) -> Iterator[str]:
    """Serve while the block runs, in a thread with an event loop of its own; yields the URL."""
    started: Future[None] = Future()
    stop = threading.Event()

    async def serve() -> None:
        worker = WorkerCore(config, settings)
        await asyncio.to_thread(worker.open)
        dispatcher = LocalDispatcher(config, worker)
        services = open_services(config, dispatcher)
        await services.start()
        http = HttpServer(create_app(services), config.http)
        await http.start()
        started.set_result(None)
        await asyncio.to_thread(stop.wait)
        await services.close(0.0)
        await dispatcher.close(0.0)
        await http.stop(0.0)
        await services.flush()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="local server")
    thread.start()
    try:
        started.result(START_TIMEOUT_S)
        yield f"http://{config.http.host}:{config.http.port}"
    finally:
        stop.set()
        thread.join(STOP_TIMEOUT_S)
        assert not thread.is_alive()
