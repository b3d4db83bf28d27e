"""Server-sent events, as https://html.spec.whatwg.org/multipage/server-sent-events.html has them.

Shared by OpenAI streaming and the events of jobs. A stream that is idle sends comments, so that
proxies keep it open and a client that has gone is noticed; when the client goes, the generator
behind the stream is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.disconnect import gone

HEARTBEAT_S = 10.0
"""Idle seconds after which a comment is sent; common proxies give up after 30 to 60."""
HEARTBEAT = b": still here\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    """One event.

    Attributes:
        data: anything that JSON can hold.
        event: its name; clients that name no listener hear ``message``.
        id: what a client that reconnects sends back as ``Last-Event-ID``.
    """

    data: Any
    event: str | None = None
    id: str | None = None

    def encode(self) -> bytes:
        """The event on the wire, its closing blank line included.

        Raises:
            ValueError: a name or id with a line break or NUL, which would forge other fields.
        """
        lines = []
        for name, value in (("event", self.event), ("id", self.id)):
            if value is None:
                continue
            if any(mark in value for mark in "\r\n\0"):
                raise ValueError(f"the {name} of an event holds a line break or NUL")
            lines.append(f"{name}: {value}")
        # JSON escapes every line break, so the data is always one line.
        lines.append(f"data: {json.dumps(self.data, separators=(',', ':'), allow_nan=False)}")
        return ("\n".join(lines) + "\n\n").encode()


class Closable(Protocol):
    """What holds something until it is closed. Closing twice is harmless."""

    async def aclose(self) -> object:
        """Let go."""
        ...


class EventStream(Response):
    """A response that sends what ``events`` yields, until it ends or the client goes.

    Args:
        events: closed in every case.
        sources: closed after it. A generator that never started runs no ``finally`` when it is
            closed: what it reads from is named here, so that a client that is gone before the
            first event leaves nothing behind.
        heartbeat_s: idle seconds between comments.
        retry_ms: how long a client should wait before it reconnects; None leaves it to the client.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[ServerEvent, None],
        *,
        sources: Sequence[Closable] = (),
        heartbeat_s: float = HEARTBEAT_S,
        retry_ms: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies must neither keep nor collect what is worth something only now.
        own = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, headers={**own, **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._sources = sources
        self._heartbeat_s = heartbeat_s
        self._retry_ms = retry_ms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send events and listen for the client's end of the line, whichever ends first."""
        sending = asyncio.create_task(self._send(send))
        listening = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, listening):
                task.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)
            for source in (self._events, *self._sources):
                await source.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        first = b"" if self._retry_ms is None else f"retry: {self._retry_ms}\n\n".encode()
        await _part(send, first)
        # The client went in the middle of a write: nobody is left to tell.
        with contextlib.suppress(OSError):
            async for chunk in self._chunks():
                await _part(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """Encoded events, with a comment wherever nothing came for a while."""
        coming: asyncio.Future[ServerEvent] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({coming}, timeout=self._heartbeat_s)
                if not done:
                    yield HEARTBEAT
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield event.encode()
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


async def _part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
