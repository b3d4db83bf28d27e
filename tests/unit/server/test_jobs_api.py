"""The interface of jobs, over a dispatcher that follows a script and a store in memory."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from engine.errors import ExecutionError
from server.auth import new_key
from server.config import (
    AuthConfig,
    HttpConfig,
    JobsConfig,
    LimitsConfig,
    ServeConfig,
    TenantConfig,
)
from server.errors import JobsUnavailableError
from server.gateway import create_app
from server.job_replies import events_of
from server.jobs.memory import MemoryJobStore
from server.services import Services
from tests.unit.server.scripted import ScriptedDispatcher, services_of

pytestmark = pytest.mark.anyio

SHOP, RIVAL = new_key(), new_key()
TENANTS = AuthConfig(
    tenants=(
        TenantConfig(id="shop", key_hashes=(SHOP.hash,)),
        TenantConfig(id="rival", key_hashes=(RIVAL.hash,)),
    )
)
OPEN = ServeConfig(limits=LimitsConfig(max_pictures=4))


@dataclass
class Server:
    client: httpx.AsyncClient
    services: Services
    dispatcher: ScriptedDispatcher

    async def make(self, *, status: int = 202, key: str | None = None, **fields: Any) -> Any:
        headers = {} if key is None else {"idempotency-key": key}
        body = {"prompt": "a red umbrella", "seed": 7, "steps": 4, **fields}
        reply = await self.client.post("/v1/jobs", json=body, headers=headers)
        assert reply.status_code == status, reply.text
        assert "umbrella" not in reply.text
        return reply.json()

    async def get(self, path: str, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        reply = await self.client.get(path, headers=headers)
        assert reply.status_code == status, reply.text
        return reply.json()

    async def events(self, job_id: str, after: int | None = None) -> list[dict[str, Any]]:
        headers = {} if after is None else {"last-event-id": str(after)}
        reply = await self.client.get(f"/v1/jobs/{job_id}/events", headers=headers)
        assert reply.headers["content-type"].startswith("text/event-stream")
        return list(parsed(reply.text))

    async def ended(self, job_id: str) -> Any:
        await self.events(job_id)
        return await self.get(f"/v1/jobs/{job_id}")


def parsed(text: str) -> Iterable[dict[str, Any]]:
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            yield {**fields, "data": json.loads(fields["data"])}


@asynccontextmanager
async def serving(
    config: ServeConfig = OPEN, dispatcher: ScriptedDispatcher | None = None, key: str | None = None
) -> AsyncIterator[Server]:
    dispatcher = dispatcher or ScriptedDispatcher()
    services = services_of(dispatcher, config)
    await services.start()
    app = create_app(services)
    headers = {} if key is None else {"x-api-key": key}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
    ) as client:
        yield Server(client, services, dispatcher)
    await services.close(0.0)


async def test_a_job_from_its_making_to_its_pictures() -> None:
    async with serving() as server:
        made = await server.make(n=2)
        assert (made["object"], made["n"], made["model"]) == ("job", 2, "tintype")
        assert made["usage"]["total_tokens"] == 16  # four guided steps of two pictures
        done = await server.ended(made["id"])
        assert done["status"] == "succeeded"
        assert done["expires_at"] - done["finished_at"] == 3600
        assert [item["darkroom"]["seed"] for item in done["data"]] == [7, 8]
        for item in done["data"]:
            assert item["b64_json"] is None
            linked = await server.client.get(item["url"], headers={})
            own = await server.client.get(f"/v1/jobs/{made['id']}/images/{item['index']}")
            assert linked.content == own.content
            assert linked.content.startswith(b"\x89PNG")
            assert linked.headers["content-type"] == "image/png"


async def test_a_job_draws_with_all_that_it_asked_for() -> None:
    """What a request says is packed and unpacked on its way to the engine."""
    async with serving() as server:
        asked: dict[str, Any] = {"clip_skip": 2, "guidance_rescale": 0.7}
        made = await server.make(guidance_interval=[0.1, 0.9], **asked)
        await server.ended(made["id"])
        [task] = server.dispatcher.tasks
        assert (task.request.clip_skip, task.request.guidance_rescale) == (2, 0.7)
        assert task.request.guidance_interval == (0.1, 0.9)
        refused = await server.make(status=422, clip_skip=9)
        assert refused["error"]["param"] == "clip_skip"


async def test_jobs_are_counted_in_the_metrics() -> None:
    async with serving() as server:
        page = (await server.client.get("/metrics")).text
        assert sample(page, "darkroom_jobs_ended_total", outcome="failed") == 0.0
        assert sample(page, "darkroom_webhook_deliveries_total", outcome="given_up") == 0.0
        await server.ended((await server.make())["id"])
        server.dispatcher.failures[0] = ExecutionError("NaN at step 3")
        await server.ended((await server.make())["id"])
        server.dispatcher.hangs = True
        hanging = (await server.make())["id"]
        page = (await server.client.get("/metrics")).text
        assert sample(page, "darkroom_jobs", status="queued") == 1.0
        assert sample(page, "darkroom_jobs", status="running") == 0.0
        await server.client.delete(f"/v1/jobs/{hanging}")
        await server.ended(hanging)
        page = (await server.client.get("/metrics")).text
        for outcome in ("succeeded", "failed", "cancelled"):
            assert sample(page, "darkroom_jobs_ended_total", outcome=outcome) == 1.0
            assert sample(page, "darkroom_job_seconds_count", outcome=outcome) == 1.0
        assert sample(page, "darkroom_gateway_pictures_total", model="tintype") == 1.0


def sample(page: str, name: str, **labels: str) -> float:
    """The one sample of that name with these labels among its own."""
    said = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith(name + "{")]
    [line] = [line for line in lines if all(label in line for label in said)]
    return float(line.rpartition(" ")[2])


async def test_location_names_the_job() -> None:
    async with serving() as server:
        reply = await server.client.post("/v1/jobs", json={"prompt": "x"})
        assert reply.headers["location"] == f"/v1/jobs/{reply.json()['id']}"


async def test_events_tell_everything_in_order() -> None:
    async with serving() as server:
        made = await server.make(partial_images=1)
        events = await server.events(made["id"])
        names = [event["event"] for event in events]
        assert names == ["queued", "started", "progress", "progress", "progress", "picture", "done"]
        assert [int(event["id"]) for event in events] == list(range(1, 8))
        assert events[0]["data"] == {"index": 0, "position": 1, "steps_ahead": 40}
        assert [event["data"]["step"] for event in events[2:5]] == [1, 2, 3]
        assert events[5]["data"]["darkroom"]["seed"] == 7
        assert events[6]["data"]["status"] == "succeeded"
        assert (await server.client.get(events[5]["data"]["url"])).status_code == 200


async def test_the_latest_preview_comes_with_its_step() -> None:
    dispatcher = ScriptedDispatcher(hangs_after=1)
    async with serving(dispatcher=dispatcher) as server:
        made = await server.make(n=2, partial_images=3)
        await dispatcher.hanging.wait()
        previews = []
        async with asyncio.timeout(10):
            async for event in following(server, made["id"]):
                if "preview_b64" in event["data"]:
                    previews.append(event["data"])
                if event["event"] == "picture":
                    break
        # The script is ahead of any reader: of the first picture, no preview is left to see.
        assert all(base64.b64decode(item["preview_b64"])[:4] == b"\x89PNG" for item in previews)
        await server.client.delete(f"/v1/jobs/{made['id']}")


async def following(server: Server, job_id: str) -> AsyncIterator[dict[str, Any]]:
    """Events as they happen, which an ASGI client in one process cannot show."""
    job = await server.services.jobs.job("anonymous", job_id)
    async for event in events_of(job, 0, server.services):
        for item in parsed(event.encode().decode()):
            yield item


async def test_a_reader_goes_on_where_it_stopped() -> None:
    async with serving() as server:
        made = await server.make()
        whole = await server.events(made["id"])
        assert await server.events(made["id"], after=4) == whole[4:]
        again = await server.client.get(
            f"/v1/jobs/{made['id']}/events", headers={"last-event-id": whole[-1]["id"]}
        )
        assert again.status_code == 204  # an EventSource stops asking


async def test_the_same_key_and_body_make_one_job() -> None:
    async with serving() as server:
        replies = await asyncio.gather(*(server.make(key="k-1") for _ in range(8)))
        assert len({reply["id"] for reply in replies}) == 1
        await server.ended(replies[0]["id"])
        reply = await server.client.post(
            "/v1/jobs",
            content=b'{"steps":4, "seed":7,  "prompt": "a red umbrella", "n": null}',
            headers={"idempotency-key": "k-1", "content-type": "application/json"},
        )
        assert reply.json()["id"] == replies[0]["id"]
        assert reply.headers["idempotency-replayed"] == "true"
        assert len(server.dispatcher.tasks) == 1


async def test_the_same_key_with_another_body_is_a_conflict() -> None:
    async with serving() as server:
        first = await server.make(key="k-1")
        error = (await server.make(status=409, key="k-1", seed=8))["error"]
        assert (error["code"], error["param"]) == ("conflict", "idempotency-key")
        await server.ended(first["id"])
        await server.client.delete(f"/v1/jobs/{first['id']}")
        gone = (await server.make(status=409, key="k-1"))["error"]
        assert "gone" in gone["message"]


async def test_a_job_is_cancelled_and_its_slot_is_free() -> None:
    dispatcher = ScriptedDispatcher(hangs=True)
    async with serving(dispatcher=dispatcher) as server:
        made = await server.make()
        await dispatcher.started.wait()
        said = await server.client.delete(f"/v1/jobs/{made['id']}")
        assert said.json()["status"] in ("queued", "cancelled")
        done = await server.ended(made["id"])
        assert (done["status"], done["data"], done["cancelling"]) == ("cancelled", [], False)
        assert dispatcher.closed == 1


async def test_a_finished_job_is_forgotten_when_it_is_deleted() -> None:
    async with serving() as server:
        made = await server.make()
        done = await server.ended(made["id"])
        assert (await server.client.delete(f"/v1/jobs/{made['id']}")).status_code == 200
        await server.get(f"/v1/jobs/{made['id']}", status=404)
        assert (await server.client.get(done["data"][0]["url"])).status_code == 404


async def test_a_failure_says_why_and_keeps_what_is_there() -> None:
    dispatcher = ScriptedDispatcher(failures={1: ExecutionError("the graph gave NaN")})
    async with serving(dispatcher=dispatcher) as server:
        made = await server.make(n=3)
        done = await server.ended(made["id"])
        assert (done["status"], done["error"]["code"]) == ("failed", "execution_failed")
        assert [item["index"] for item in done["data"]] == [0]


async def test_an_unplanned_failure_tells_nothing_of_itself() -> None:
    dispatcher = ScriptedDispatcher(refusal=RuntimeError("secret internals"))
    async with serving(dispatcher=dispatcher) as server:
        done = await server.ended((await server.make())["id"])
        assert done["error"]["code"] == "internal_error"
        assert "secret" not in json.dumps(done)


async def test_pictures_inline_where_they_were_asked_for() -> None:
    async with serving() as server:
        made = await server.make(response_format="b64_json", output_format="webp")
        done = await server.ended(made["id"])
        assert base64.b64decode(done["data"][0]["b64_json"])[8:12] == b"WEBP"
        listed = (await server.get("/v1/jobs"))["data"][0]
        assert listed["data"][0]["b64_json"] is None


async def test_jobs_are_listed_in_pages() -> None:
    async with serving() as server:
        ids = [(await server.make(seed=i))["id"] for i in range(3)]
        first = await server.get("/v1/jobs?limit=2")
        assert [job["id"] for job in first["data"]] == [ids[2], ids[1]]
        assert first["has_more"]
        rest = await server.get(f"/v1/jobs?limit=2&after={ids[1]}")
        assert [job["id"] for job in rest["data"]] == [ids[0]]
        assert not rest["has_more"]


async def test_another_tenants_job_is_not_there() -> None:
    config = ServeConfig(auth=TENANTS)
    async with serving(config, key=SHOP.key) as server:
        made = await server.make(key="k-1")
        await server.ended(made["id"])
        rival = {"x-api-key": RIVAL.key}
        path = f"/v1/jobs/{made['id']}"
        for tail in ("", "/events", "/images/0"):
            error = await server.get(path + tail, status=404, headers=rival)
            assert error == await server.get(
                path.replace(made["id"], "job-" + "0" * 32) + tail, status=404, headers=rival
            )
        assert (await server.client.delete(path, headers=rival)).status_code == 404
        assert (
            await server.client.get(f"/v1/jobs?after={made['id']}", headers=rival)
        ).status_code == 404
        assert (await server.get("/v1/jobs", headers=rival))["data"] == []
        assert len((await server.get("/v1/jobs"))["data"]) == 1
        body = {"prompt": "another", "steps": 4}
        theirs = await server.client.post(
            "/v1/jobs", json=body, headers={**rival, "idempotency-key": "k-1"}
        )
        assert theirs.status_code == 202


async def test_links_work_without_a_key_and_nothing_else_does() -> None:
    async with serving(ServeConfig(auth=TENANTS), key=SHOP.key) as server:
        done = await server.ended((await server.make())["id"])
        url = done["data"][0]["url"]
        async with httpx.AsyncClient(transport=server.client._transport) as stranger:
            assert (await stranger.get(url)).status_code == 200
            assert (await stranger.get(url.replace("0.png", "1.png"))).status_code == 403
            assert (await stranger.get(url + "x")).status_code == 403
            later = url.replace("expires=", "expires=9")
            assert (await stranger.get(later)).status_code == 403
            assert (await stranger.get(f"http://test/v1/jobs/{done['id']}")).status_code == 401


async def test_links_begin_with_the_configured_address() -> None:
    config = ServeConfig(http=HttpConfig(public_url="https://pictures.example/"))
    async with serving(config) as server:
        done = await server.ended((await server.make())["id"])
        assert done["data"][0]["url"].startswith("https://pictures.example/v1/files/job-")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"stream": True}, 400, "stream"),
        ({"n": 5}, 400, "n"),
        ({"steps": 0}, 400, "steps"),
        ({"size": "65x64"}, 422, "size"),
        ({"model": "other"}, 404, "model"),
        ({"image": "x"}, 400, "image"),
        ({"webhook": {"url": "https://hooks.example", "secret": "short"}}, 400, "webhook.secret"),
        ({"webhook": {"url": "https://hooks.example", "secret": "s" * 16}}, 403, "webhook.url"),
    ],
)
async def test_what_cannot_be_drawn_is_refused_at_once(
    fields: dict[str, Any], status: int, param: str
) -> None:
    async with serving() as server:
        error = (await server.make(status=status, **fields))["error"]
        assert error["param"] == param
        assert (await server.get("/v1/jobs"))["data"] == []


@pytest.mark.parametrize("key", ["", "a b", "k" * 256])
async def test_a_malformed_key_is_refused(key: str) -> None:
    async with serving() as server:
        await server.make(status=400, key=key)


async def test_too_many_jobs_are_refused_with_a_time_to_wait() -> None:
    config = ServeConfig(jobs=JobsConfig(max_jobs=1))
    async with serving(config, ScriptedDispatcher(hangs=True)) as server:
        made = await server.make()
        reply = await server.client.post("/v1/jobs", json={"prompt": "x"})
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        await server.client.delete(f"/v1/jobs/{made['id']}")


async def test_while_the_store_is_away_jobs_are_unavailable_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away(*arguments: Any, **more: Any) -> Any:
        raise JobsUnavailableError("the store of jobs does not answer; try again")

    async with serving() as server:
        for method in ("create", "job", "jobs", "beat"):
            monkeypatch.setattr(MemoryJobStore, method, away)
        error = (await server.make(status=503))["error"]
        assert error["code"] == "jobs_unavailable"
        reply = await server.client.get("/v1/jobs")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        body = {"prompt": "x", "steps": 2}
        drawn = await server.client.post("/v1/images/generations", json=body)
        assert drawn.status_code == 200
