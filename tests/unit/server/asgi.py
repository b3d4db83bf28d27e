"""Drives an ASGI application by hand, for what no client lets a test do: leave in the middle."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class Call:
    """One request: sends its body, collects what comes back, and leaves when told to."""

    def __init__(self, app: ASGIApp, path: str, body: Any, *, method: str = "POST") -> None:
        self.sent: list[Message] = []
        self.arrived = asyncio.Event()
        self._app = app
        self._left = asyncio.Event()
        data = json.dumps(body).encode()
        self._incoming = [{"type": "http.request", "body": data, "more_body": False}]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"test"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def run(self) -> None:
        """Until the application is done with the request."""
        await self._app(self._scope, self._receive, self._send)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> Message:
        if self._incoming:
            return self._incoming.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self.arrived.set()
