"""A gateway with jobs in Redis in a process of its own, to be killed. Draws by script."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import replace

import uvicorn

from server.config import RedisConfig, ServeConfig
from server.gateway import create_app
from server.jobs.runner import JobRunner
from server.jobs.store import JobStore
from server.listener import uvicorn_config
from server.services import Services, open_services
from tests.unit.server.scripted import ScriptedDispatcher

ALIVE_S = 2.0


def quick(services: Services, store: JobStore) -> Services:
    """The same services with a gateway that is missed after two seconds."""
    jobs = JobRunner(
        dispatcher=services.dispatcher,
        store=store,
        config=services.config.jobs,
        beat_s=0.3,
        alive_s=ALIVE_S,
    )
    return replace(services, jobs=jobs)


async def main(redis_url: str) -> None:
    """Serve until killed; prints the port. Of each job, the second picture never ends."""
    config = ServeConfig(redis=RedisConfig(url=redis_url, timeout_s=5.0))
    services = open_services(config, ScriptedDispatcher(hangs_after=1))
    services = quick(services, services.jobs.store)
    await services.start()
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn_config(create_app(services), config.http))
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
