"""A client that goes away takes its pictures with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.errors import CancelledError
from server.disconnect import until_gone
from server.events import opened
from server.gateway import create_app
from server.messages import PictureEvent, Queued
from tests.unit.server.asgi import Call
from tests.unit.server.scripted import ScriptedDispatcher, services_of

GENERATIONS = "/v1/images/generations"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_closes_the_dispatchers_generator(stream: bool) -> None:
    async def scene() -> None:
        dispatcher = ScriptedDispatcher(hangs=True)
        services = services_of(dispatcher)
        call = Call(create_app(services), GENERATIONS, {"prompt": "x", "stream": stream})
        running = asyncio.create_task(call.run())
        await dispatcher.started.wait()
        if stream:
            await call.arrived.wait()
        assert dispatcher.closed == 0
        call.leave()
        await asyncio.wait_for(running, 10)
        assert dispatcher.closed == 1
        counted = services.metrics.registry.get_sample_value
        assert counted("darkroom_http_requests_in_flight") == 0
        labels = {"route": GENERATIONS, "outcome": "cancelled"}
        assert counted("darkroom_http_requests_total", labels) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())


def test_leaving_before_the_first_event_of_a_stream_closes_it_too() -> None:
    """Its generator never started, so nothing in it could have cleaned up."""

    async def scene() -> None:
        dispatcher = ScriptedDispatcher(hangs=True)
        call = Call(create_app(services_of(dispatcher)), GENERATIONS, {"prompt": "x", "stream": 1})
        call.leave()
        await asyncio.wait_for(call.run(), 10)
        assert dispatcher.closed == len(dispatcher.tasks)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())


def test_work_that_ends_first_gives_its_result() -> None:
    async def stays() -> Any:
        await asyncio.Event().wait()

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert asyncio.run(until_gone(stays, work())) == 7


def test_work_that_is_cancelled_has_cleaned_up() -> None:
    cleaned = []

    async def leaves() -> Any:
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(CancelledError):
        asyncio.run(until_gone(leaves, work()))
    assert cleaned == [True]


def test_events_that_take_their_time_are_opened_all_the_same() -> None:
    async def scene() -> None:
        release = asyncio.Event()
        closed = []

        async def slow() -> AsyncGenerator[PictureEvent, None]:
            try:
                await release.wait()
                yield Queued(0, 1, 1)
                yield Queued(0, 2, 1)
            finally:
                closed.append(True)

        events = await opened(slow(), timeout_s=0.0)
        release.set()
        assert [event async for event in events] == [Queued(0, 1, 1), Queued(0, 2, 1)]
        release.clear()
        unread = await opened(slow(), timeout_s=0.0)
        await unread.aclose()
        assert closed == [True, True]

    asyncio.run(scene())
