"""Jobs over a real engine and a real server: what a client sees while a picture appears."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image as Pillow

from server.gateway import create_app
from server.listener import uvicorn_config
from server.local import LocalDispatcher
from server.services import open_services
from server.worker_core import WorkerCore
from tests.redis_server import free_port
from tests.serving import settings_for, tiny_config

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a red umbrella", "seed": 3, "steps": 6, "cache": {"mode": "off"}}
Darkroom = Callable[[], Any]


@pytest.fixture
def darkroom(tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path) -> Darkroom:
    """A function that opens a whole server on a tiny model, and a client of it."""
    config = tiny_config(tiny_checkpoint("text"), http={"port": free_port()})
    settings = settings_for(plans, tmp_path)

    @asynccontextmanager
    async def open_() -> AsyncIterator[httpx.AsyncClient]:
        worker = WorkerCore(config, settings)
        await asyncio.to_thread(worker.open)
        dispatcher = LocalDispatcher(config, worker)
        services = open_services(config, dispatcher)
        await services.start()
        server = uvicorn.Server(uvicorn_config(create_app(services), config.http))
        serving = asyncio.create_task(server.serve())
        base = f"http://127.0.0.1:{config.http.port}"
        async with asyncio.timeout(60), httpx.AsyncClient(base_url=base, timeout=60) as client:
            while not server.started:
                await asyncio.sleep(0.01)
            yield client
        server.should_exit = True
        await serving
        await services.close(0.0)
        await dispatcher.close(0.0)

    return open_


async def events(
    client: httpx.AsyncClient, job_id: str, after: str | None = None
) -> AsyncIterator[tuple[str, str, dict[str, Any]]]:
    """(id, name, data) as they come."""
    headers = {} if after is None else {"last-event-id": after}
    fields: dict[str, str] = {}
    async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
            elif "data" in fields:
                yield fields["id"], fields["event"], json.loads(fields["data"])
                fields = {}


async def make(client: httpx.AsyncClient, **fields: Any) -> str:
    reply = await client.post("/v1/jobs", json=BODY | fields)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


async def test_a_jobs_pictures_are_those_of_a_request(darkroom: Darkroom) -> None:
    async with darkroom() as client:
        job_id = await make(client, n=2, partial_images=2)
        seen = [event async for event in events(client, job_id)]
        done = seen[-1][2]
        assert (seen[-1][1], done["status"]) == ("done", "succeeded")
        steps = [data["step"] for _, name, data in seen if name == "progress" and not data["index"]]
        assert steps == [1, 2, 3, 4, 5, 6]
        for _, _, data in seen:
            if "preview_b64" in data:
                Pillow.open(BytesIO(base64.b64decode(data["preview_b64"]))).verify()
        at_once = await client.post("/v1/images/generations", json=BODY | {"n": 2})
        for item, own in zip(at_once.json()["data"], done["data"], strict=True):
            linked = Pillow.open(BytesIO((await client.get(own["url"])).content))
            direct = Pillow.open(BytesIO(base64.b64decode(item["b64_json"])))
            assert linked.tobytes() == direct.tobytes()
            assert own["darkroom"]["timings_ms"]["denoise"] > 0
        assert (await client.get("/metrics")).text.count("darkroom_gateway_pictures_total{") >= 1


async def test_a_reader_that_was_cut_off_goes_on_and_sees_previews(darkroom: Darkroom) -> None:
    async with darkroom() as client:
        # Long enough that it is not over before the reader sees a preview: those are not kept.
        job_id = await make(client, n=10, steps=150, partial_images=75)
        cut_at = ""
        previews = 0
        async for number, name, data in events(client, job_id):
            previews += "preview_b64" in data
            if name == "progress" and data["step"] >= 10 and previews:
                cut_at = number
                break
        assert cut_at
        rest = [number async for number, _, _ in events(client, job_id, after=cut_at)]
        assert [int(number) for number in rest] == list(
            range(int(cut_at) + 1, int(cut_at) + 1 + len(rest))
        )


async def test_a_cancelled_job_stops_between_two_steps(darkroom: Darkroom) -> None:
    async with darkroom() as client:
        job_id = await make(client, steps=150)
        steps = 0
        async for _, name, data in events(client, job_id):
            if name == "progress":
                steps = data["step"]
                if steps == 3:
                    assert (await client.delete(f"/v1/jobs/{job_id}")).status_code == 200
            elif name == "done":
                assert (data["status"], data["data"]) == ("cancelled", [])
        assert 3 <= steps < 150
        async with asyncio.timeout(30):
            while (await client.get("/v1/jobs")).json()["data"][0]["cancelling"]:
                await asyncio.sleep(0.05)
