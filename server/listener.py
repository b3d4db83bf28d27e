"""How a gateway listens: uvicorn, with bounds on what comes before there is a request.

uvicorn bounds neither the head of a request nor the time it takes, with httptools as its parser.
:class:`BoundedProtocol` adds both, a bound on connections, and one on what surrounds the bytes of
a body (chunk headers, trailers). Bodies are :mod:`server.middleware.body_limit`'s.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.config import HttpConfig

KEEP_ALIVE_S = 75
"""Idle connections end after this: longer than clients (5 s) and load balancers (60 s) keep them,
so that none sends a request into a connection that is just closing."""
_FRAMING_PER_BODY_BYTE = 8
"""A chunk of one byte comes with five bytes around it; more is somebody playing."""


def uvicorn_config(app: ASGIApp, http: HttpConfig, **more: Any) -> uvicorn.Config:
    """The settings of every server of ours; ``more`` are further ones of uvicorn's.

    Lifespan events are off: whoever builds the application also closes it.
    """

    class Protocol(BoundedProtocol):
        """The protocol with this server's bounds."""

        bounds = http

    settings: dict[str, Any] = {
        "host": http.host,
        "port": http.port,
        "http": Protocol,
        "ws": "none",
        "lifespan": "off",
        "timeout_keep_alive": KEEP_ALIVE_S,
        "proxy_headers": False,  # nobody may say where a request came from but the connection
        "server_header": False,
        "access_log": False,
        "log_config": None,
    }
    return uvicorn.Config(app, **(settings | more))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with bounds on heads, framing, connections, and the time of a head."""

    bounds: ClassVar[HttpConfig]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or turn it away where there are too many."""
        super().connection_made(transport)
        self._cycles: list[RequestResponseCycle] = []
        self._timer: asyncio.TimerHandle | None = None
        self._credit_bytes = self.bounds.max_head_bytes
        self._idle = True
        if len(self.connections) > self.bounds.max_connections:
            self._refuse(503, "unavailable", "too many connections are open")
        else:
            self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Count what comes, and pass it on to the parser."""
        self._idle = False
        if self._timer is None and self._between_requests:
            self._start_timer()
        self._credit_bytes -= len(data)
        super().data_received(data)
        if self._credit_bytes < 0 and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """A new request: what it may spend on its head."""
        self._credit_bytes = self.bounds.max_head_bytes
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there, in time; start the request if it is within its bound."""
        self._stop_timer()
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > self.bounds.max_head_bytes:
            self._refuse_head()
            return
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Bytes of a body excuse themselves and some framing."""
        self._credit_bytes += len(body) * (1 + _FRAMING_PER_BODY_BYTE)
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self._between_requests:  # the rest of a body whose request was answered before its end
            self._idle = True
            self._stop_timer()
            self._start_timer()
        if self.cycle is not None:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of the connection, also those before the last one that was read."""
        self._stop_timer()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's own words)
        """The parser gave up."""
        if not self.transport.is_closing():
            self._refuse(400, "invalid_request_error", "this is not HTTP/1.1")

    # ------------------------------------------------------------------ helpers

    @property
    def _between_requests(self) -> bool:
        return all(cycle.response_complete for cycle in self._cycles)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.bounds.read_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._idle:  # browsers open connections that they may never use
            self.transport.close()
            return
        wait_s = self.bounds.read_timeout_s
        self._refuse(408, "invalid_request_error", f"the head took longer than {wait_s:g} s")

    def _refuse_head(self) -> None:
        bound = self.bounds.max_head_bytes
        self._refuse(431, "invalid_request_error", f"the head is larger than {bound} bytes")

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer without a request to answer to, and close."""
        code = HTTPStatus(status).name.lower()
        error = {"type": kind, "code": code, "message": message, "param": None}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        if status == 503:
            head += "retry-after: 1\r\n"
        if not any(cycle.response_started for cycle in self._cycles):
            self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()
