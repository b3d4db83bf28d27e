"""Server-sent events on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from server.sse import HEARTBEAT, EventStream, ServerEvent
from tests.unit.server.asgi import Call


def test_an_event_is_one_block() -> None:
    event = ServerEvent(data={"a": "x\ny"}, event="step", id="7")
    assert event.encode() == b'event: step\nid: 7\ndata: {"a":"x\\ny"}\n\n'
    assert ServerEvent(data=1).encode() == b"data: 1\n\n"


@pytest.mark.parametrize("mark", ["\n", "\r", "\0"])
def test_names_and_ids_cannot_forge_fields(mark: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        ServerEvent(data=1, event=f"a{mark}data: 2").encode()
    with pytest.raises(ValueError, match="line break"):
        ServerEvent(data=1, id=f"a{mark}").encode()


async def two_events() -> AsyncGenerator[ServerEvent, None]:
    yield ServerEvent(data=1)
    yield ServerEvent(data=2)


def test_a_stream_ends_with_its_events() -> None:
    call = Call(EventStream(two_events(), retry_ms=500, headers={"x-a": "b"}), "/", {})
    asyncio.run(call.run())
    headers = dict(call.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-a"] == b"b"
    assert b"content-length" not in headers
    assert call.body == b"retry: 500\n\ndata: 1\n\ndata: 2\n\n"
    assert call.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_an_idle_stream_shows_that_it_lives() -> None:
    async def scene() -> None:
        beating = asyncio.Event()

        async def idle() -> AsyncGenerator[ServerEvent, None]:
            await beating.wait()
            yield ServerEvent(data=1)

        call = Call(EventStream(idle(), heartbeat_s=0.0), "/", {})
        running = asyncio.create_task(call.run())
        while call.body.count(HEARTBEAT) < 3:
            await asyncio.sleep(0)
        beating.set()
        await running
        assert call.body.replace(HEARTBEAT, b"") == b"data: 1\n\n"

    asyncio.run(scene())


def test_a_client_that_leaves_closes_the_generator() -> None:
    async def scene() -> None:
        closed = []

        async def endless() -> AsyncGenerator[ServerEvent, None]:
            try:
                yield ServerEvent(data=1)
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        call = Call(EventStream(endless()), "/", {})
        running = asyncio.create_task(call.run())
        while b"data: 1" not in call.body:
            await asyncio.sleep(0)
        call.leave()
        await running
        assert closed == [True]

    asyncio.run(scene())


def test_a_write_that_fails_is_the_client_gone_and_no_error() -> None:
    async def scene() -> None:
        closed = []

        async def events() -> AsyncGenerator[ServerEvent, None]:
            try:
                yield ServerEvent(data=1)
            finally:
                closed.append(True)

        call = Call(EventStream(events()), "/", {})

        async def send(message: object) -> None:
            if b"data" in str(message).encode():
                raise OSError("gone")

        await EventStream(events())({}, call._receive, send)
        assert closed == [True]

    asyncio.run(scene())
