"""Jobs on a real Redis that is killed, paused and restarted, and on a gateway that is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import RedisConfig, ServeConfig
from server.gateway import create_app
from server.messages import PictureEvent, PictureTask
from server.services import open_services
from tests.integration.server.job_gateway import quick
from tests.redis_server import RedisServer
from tests.unit.server.scripted import ScriptedDispatcher

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a red umbrella", "seed": 7, "steps": 4}


class Unhurried(ScriptedDispatcher):
    """Takes a moment for each picture."""

    async def _one(self, task: PictureTask) -> AsyncGenerator[PictureEvent, None]:
        await asyncio.sleep(0.05)
        async for event in super()._one(task):
            yield event


class Paused(ScriptedDispatcher):
    """Waits before the second picture until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def _one(self, task: PictureTask) -> AsyncGenerator[PictureEvent, None]:
        if task.index == 1:
            self.hanging.set()
            await self.go_on.wait()
        async for event in super()._one(task):
            yield event


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@asynccontextmanager
async def gateway(
    server: RedisServer, dispatcher: ScriptedDispatcher
) -> AsyncIterator[httpx.AsyncClient]:
    config = ServeConfig(redis=RedisConfig(url=server.url, timeout_s=0.5))
    services = open_services(config, dispatcher)
    services = quick(services, services.jobs.store)
    await services.start()
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client
    await services.close(0.0)


async def make(client: httpx.AsyncClient, status: int = 202, **fields: Any) -> Any:
    reply = await client.post("/v1/jobs", json=BODY | fields)
    assert reply.status_code == status, reply.text
    return reply.json()


async def ended(client: httpx.AsyncClient, job_id: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            reply = await client.get(f"/v1/jobs/{job_id}")
            if reply.status_code == 200 and reply.json()["finished_at"] is not None:
                return reply.json()
            await asyncio.sleep(0.05)


class Load:
    """Clients that ask for pictures and jobs again and again, and note every answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.pictures: list[int] = []
        self.jobs: list[tuple[int, str | None]] = []
        self.stopping = False

    async def draw(self) -> None:
        while not self.stopping:
            reply = await self.client.post("/v1/images/generations", json=BODY)
            self.pictures.append(reply.status_code)

    async def ask(self) -> None:
        while not self.stopping:
            reply = await self.client.post("/v1/jobs", json=BODY)
            code = reply.json()["error"]["code"] if reply.status_code != 202 else None
            self.jobs.append((reply.status_code, code))
            await asyncio.sleep(0.05)

    async def during(self, work: AsyncGenerator[None, None]) -> None:
        """Run while ``work`` goes on, which is resumed whenever every client has had answers."""
        clients = [asyncio.create_task(each()) for each in (self.draw, self.draw, self.ask)]
        try:
            async with asyncio.timeout(90):
                async for _ in work:
                    seen = len(self.pictures), len(self.jobs)
                    while len(self.pictures) < seen[0] + 4 or len(self.jobs) < seen[1] + 2:
                        await asyncio.sleep(0.02)
        finally:
            self.stopping = True
            await asyncio.gather(*clients)


async def test_redis_is_killed_and_comes_back_under_load(redis_server: RedisServer) -> None:
    """What needs no store goes on as if nothing were; what does is refused by name until then."""
    async with gateway(redis_server, Unhurried()) as client:
        load = Load(client)

        async def outage() -> AsyncGenerator[None, None]:
            yield
            redis_server.kill()
            yield
            first_away = len(load.jobs)
            yield
            assert set(load.jobs[first_away:]) == {(503, "jobs_unavailable")}
            redis_server.start()
            yield

        await load.during(outage())
        assert set(load.pictures) == {200}  # nobody who needs no store has noticed
        assert {code for _, code in load.jobs} == {None, "jobs_unavailable"}
        assert load.jobs[-1] == (202, None)
        after = await make(client)
        assert (await ended(client, after["id"]))["status"] == "succeeded"


async def test_a_job_that_is_drawn_while_redis_is_away_is_there_afterwards(
    redis_server: RedisServer,
) -> None:
    dispatcher = Paused()
    async with gateway(redis_server, dispatcher) as client:
        made = await make(client, n=2)
        await dispatcher.hanging.wait()
        redis_server.kill()
        reply = await client.get(f"/v1/jobs/{made['id']}")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        redis_server.start()  # and knows nothing
        assert (await client.get(f"/v1/jobs/{made['id']}")).status_code in (200, 404)
        # The owner learns of the loss with its next write, and tells the whole story again.
        dispatcher.go_on.set()
        done = await ended(client, made["id"])
        assert (done["status"], len(done["data"])) == ("succeeded", 2)
        for item in done["data"]:
            assert (await client.get(item["url"])).content.startswith(b"\x89PNG")


async def test_a_redis_that_hangs_costs_a_bounded_time(redis_server: RedisServer) -> None:
    async with gateway(redis_server, ScriptedDispatcher()) as client:
        await make(client)
        redis_server.pause()
        try:
            async with asyncio.timeout(30):
                error = (await make(client, 503))["error"]
                assert error["code"] == "jobs_unavailable"
                drawn = await client.post("/v1/images/generations", json=BODY)
                assert drawn.status_code == 200
        finally:
            redis_server.resume()
        made = await make(client)
        assert (await ended(client, made["id"]))["status"] == "succeeded"


async def test_the_jobs_of_a_killed_gateway_are_drawn_by_another(redis_server: RedisServer) -> None:
    command = [sys.executable, "-m", "tests.integration.server.job_gateway", redis_server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(await asyncio.to_thread(process.stdout.readline))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as doomed:
                headers = {"idempotency-key": "k"}
                reply = await doomed.post("/v1/jobs", json=BODY | {"n": 3}, headers=headers)
                job_id = reply.json()["id"]
                link = await _first_picture(doomed, job_id)
                first = (await doomed.get(link)).content
        finally:
            process.kill()
    dispatcher = ScriptedDispatcher()
    async with gateway(redis_server, dispatcher) as client:
        again = await client.post("/v1/jobs", json=BODY | {"n": 3}, headers=headers)
        assert again.json()["id"] == job_id  # the key is known here, too
        done = await ended(client, job_id)
        assert (done["status"], done["attempts"]) == ("succeeded", 2)
        assert [item["darkroom"]["seed"] for item in done["data"]] == [7, 8, 9]
        assert [task.index for task in dispatcher.tasks] == [1, 2]
        # The dead gateway's own link still works here: both sign alike.
        path = link.partition("/v1/")[2]
        assert (await client.get(f"/v1/{path}")).content == first


async def _first_picture(client: httpx.AsyncClient, job_id: str) -> str:
    async with asyncio.timeout(60):
        while True:
            job = (await client.get(f"/v1/jobs/{job_id}")).json()
            if job["data"]:
                return str(job["data"][0]["url"])
            await asyncio.sleep(0.05)
