"""Refusals through the HTTP application, with router and worker behind it and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import ServeConfig
from server.gateway import create_app
from server.metrics import GatewayMetrics
from server.metrics_page import families_of
from server.ray_dispatch import RayDispatcher
from server.services import open_services
from server.settings import Settings
from tests.routed import routed
from tests.serving import settings_for, tiny_config

PATIENCE_S = 120.0
LONG_STEPS = 1000
ONE_AT_A_TIME = {"limits": {"max_steps": LONG_STEPS}, "workers": {"max_live": 1}}


@pytest.fixture
def settings(plans: Path, tmp_path: Path) -> Settings:
    return settings_for(plans, tmp_path)


class Client:
    """Draws over HTTP, without a socket."""

    def __init__(self, http: httpx.AsyncClient, dispatcher: RayDispatcher) -> None:
        self.http = http
        self._dispatcher = dispatcher
        self._drawing: list[asyncio.Task[httpx.Response]] = []

    async def draw(self, **fields: Any) -> httpx.Response:
        body = {"prompt": "a red umbrella", "seed": 1, **fields}
        return await self.http.post("/v1/images/generations", json=body)

    async def occupy(self, *steps: int, **fields: Any) -> None:
        """Ask for a picture of so many steps each; the first is drawn, the others wait."""
        for waiting, count in enumerate(steps):
            self._drawing.append(asyncio.create_task(self.draw(steps=count, **fields)))
            await self.until_waiting(waiting)

    async def until_waiting(self, count: int) -> None:
        """Return when one picture is drawn and so many wait."""
        async with asyncio.timeout(PATIENCE_S):
            while (load := await self._dispatcher.load()).queued != count or not load.running:
                await asyncio.sleep(0.01)

    async def leave(self) -> None:
        for drawing in self._drawing:
            drawing.cancel()
        await asyncio.gather(*self._drawing, return_exceptions=True)

    async def refusals(self) -> dict[tuple[str, str], int]:
        """How many by (who decided, why)."""
        page = (await self.http.get("/metrics")).content
        return {
            (family.name.split("_")[1], sample.labels["reason"]): int(sample.value)
            for family in families_of(page)
            if family.name in ("darkroom_gateway_refusals", "darkroom_router_refusals")
            for sample in family.samples
            if sample.name.endswith("_total")
        }


@asynccontextmanager
async def served(config: ServeConfig, settings: Settings) -> AsyncIterator[Client]:
    metrics = GatewayMetrics()

    def refused(reason: str) -> None:
        metrics.gateway_refusals.labels(reason).inc()

    async with routed(config, settings, refused=refused) as (dispatcher, _, _):
        services = open_services(config, dispatcher, metrics=metrics)
        await services.start()
        transport = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://darkroom", timeout=PATIENCE_S
        ) as http:
            client = Client(http, dispatcher)
            try:
                yield client
            finally:
                await client.leave()
                await services.close(0.0)


def test_a_flood_on_a_full_queue_is_refused_where_it_comes_in(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> None:
    steps = 2 * LONG_STEPS  # guided
    config = tiny_config(
        tiny_checkpoint("text"), admission={"max_queued_steps": steps}, **ONE_AT_A_TIME
    )

    async def scenario() -> None:
        async with served(config, settings) as client:
            await client.occupy(LONG_STEPS, LONG_STEPS)
            replies = await asyncio.gather(*(client.draw(steps=LONG_STEPS // 2) for _ in range(40)))
            refusals = await client.refusals()
        for reply in replies:
            assert reply.status_code == 429
            assert reply.json()["error"]["code"] == "overloaded"
            assert int(reply.headers["retry-after"]) >= 1
        assert sum(refusals.values()) == 40
        assert {reason for _, reason in refusals} <= {"queue", "tenant"}
        assert refusals.get(("gateway", "queue"), 0) > 0

    asyncio.run(scenario())


def test_who_would_wait_too_long_is_refused_and_who_has_said_how_long_is_not(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> None:
    config = tiny_config(tiny_checkpoint("text"), admission={"max_wait_s": 1e-3}, **ONE_AT_A_TIME)

    async def scenario() -> None:
        async with served(config, settings) as client:
            await client.occupy(LONG_STEPS, LONG_STEPS, LONG_STEPS, deadline_s=PATIENCE_S)
            refused = await client.draw(steps=4)
            patient = asyncio.create_task(client.draw(steps=4, deadline_s=PATIENCE_S))
            await client.until_waiting(3)
            body = {"prompt": "a red umbrella", "steps": 4}
            job = (await client.http.post("/v1/jobs", json=body)).json()
            await client.until_waiting(4)
            await client.leave()
            drawn = await patient
            async with asyncio.timeout(PATIENCE_S):
                while job["status"] in ("queued", "running"):
                    job = (await client.http.get(f"/v1/jobs/{job['id']}")).json()
                    await asyncio.sleep(0.01)
            refusals = await client.refusals()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert drawn.status_code == 200
        assert job["status"] == "succeeded"
        assert [reason for _, reason in refusals] == ["wait"]

    asyncio.run(scenario())


def test_a_distilled_model_degrades_to_its_own_few_steps(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> None:
    config = tiny_config(
        tiny_checkpoint("lcm"), admission={"max_queued_steps": LONG_STEPS}, **ONE_AT_A_TIME
    )
    body = {"steps": 50, "solver": "ddim", "degrade": True}

    async def scenario() -> None:
        async with served(config, settings) as client:
            # Room for ten steps is left: a row each, because guidance is embedded.
            await client.occupy(LONG_STEPS, LONG_STEPS - 10, solver="ddim")
            degraded = asyncio.create_task(client.draw(**body))
            await client.until_waiting(2)
            await client.leave()
            crowded = (await degraded).json()["data"][0]["darkroom"]
            calm = (await client.draw(**body)).json()["data"][0]["darkroom"]
        assert (crowded["solver"], crowded["steps"]) == ("lcm", 10)
        dial = "10 lcm steps instead of 50 ddim steps"
        assert crowded["approximations"]["degraded"] == dial
        assert (calm["solver"], calm["steps"]) == ("ddim", 50)
        assert "degraded" not in calm["approximations"]

    asyncio.run(scenario())
