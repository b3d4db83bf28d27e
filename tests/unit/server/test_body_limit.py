"""Bounds on bodies, message by message; the real server's are in the integration tests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.config import HttpConfig
from server.middleware.body_limit import BodyLimit

pytestmark = pytest.mark.anyio

HTTP = HttpConfig(max_body_bytes=100, max_upload_bytes=1000, max_bodies_bytes=150)
CHUNKED = [(b"transfer-encoding", b"chunked")]


class Client:
    """Sends parts as it is told, and keeps the answer."""

    def __init__(self, path: str = "/", headers: list[tuple[bytes, bytes]] = CHUNKED) -> None:
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []

    def send_part(self, size: int, *, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})

    def leave(self) -> None:
        self.parts.put_nowait({"type": "http.disconnect"})

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        body = b"".join(part.get("body", b"") for part in self.sent)
        found: dict[str, Any] = json.loads(body)["error"]
        return found


class Reader:
    """An application that reads everything, then answers when it may."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.disconnected = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        total, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                break
            total += len(message["body"])
            more = message["more_body"]
        self.read.append(total)
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def limit(app: Reader, http: HttpConfig = HTTP) -> BodyLimit:
    return BodyLimit(app, http=http, upload_paths=("/uploads",))


async def serve(layer: BodyLimit, client: Client) -> None:
    async with asyncio.timeout(10):
        await layer(client.scope, client.parts.get, client.send)


async def test_a_body_at_its_bound_passes_and_one_byte_more_does_not() -> None:
    for size, status in ((100, 200), (101, 413)):
        app, client = Reader(), Client()
        client.send_part(size, more=False)
        await serve(limit(app), client)
        assert client.status == status


async def test_the_refusal_is_ours_whatever_the_application_says_after_it() -> None:
    app, client = Reader(), Client()
    client.send_part(60)
    client.send_part(60)
    client.leave()
    await serve(limit(app), client)
    assert (client.status, client.error["code"]) == (413, "payload_too_large")
    assert app.disconnected == 1  # and it was told that nobody is there any more
    assert sum(message["type"] == "http.response.start" for message in client.sent) == 1


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b" 5", b"5,5", b"\xb2"])
async def test_a_length_that_is_no_number_is_refused(length: bytes) -> None:
    app, client = Reader(), Client(headers=[(b"content-length", length)])
    client.send_part(0, more=False)
    await serve(limit(app), client)
    assert (client.status, client.error["param"]) == (400, "content-length")
    assert app.read == []


async def test_all_bodies_together_are_bounded_until_their_answers() -> None:
    app = Reader()
    layer = limit(app)
    app.may_answer.clear()
    first, second, third = (Client("/uploads") for _ in range(3))
    first.send_part(100, more=False)
    answering = asyncio.create_task(serve(layer, first))
    async with asyncio.timeout(10):
        while not app.read:
            await asyncio.sleep(0)
    second.send_part(60)
    second.leave()
    refused = asyncio.create_task(serve(layer, second))
    async with asyncio.timeout(10):
        while not second.sent:
            await asyncio.sleep(0)
    app.may_answer.set()
    await asyncio.gather(answering, refused)
    assert (second.status, second.error["code"]) == (429, "overloaded")
    assert first.status == 200
    third.send_part(150, more=False)  # both are over: there is room again
    await serve(layer, third)
    assert third.status == 200


async def test_a_slow_body_is_ended_and_what_is_left_of_it_not_waited_for() -> None:
    http = HttpConfig(read_timeout_s=0.02, min_upload_bytes_per_s=1e6)
    app, client = Reader(), Client()
    client.send_part(10)
    await serve(limit(app, http), client)
    assert (client.status, client.error["code"]) == (408, "too_slow")
    assert dict(client.sent[0]["headers"])[b"connection"] == b"close"


async def test_waiting_for_a_client_to_leave_is_no_slow_body() -> None:
    http = HttpConfig(read_timeout_s=0.02, min_upload_bytes_per_s=1e6)
    heard: list[str] = []

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        heard.append((await receive())["type"])

    client = Client()
    client.send_part(10, more=False)
    layer = BodyLimit(patient, http=http, upload_paths=())
    serving = asyncio.create_task(serve(layer, client))
    await asyncio.sleep(0.1)
    assert heard == []
    client.leave()
    await serving
    assert heard == ["http.disconnect"]
