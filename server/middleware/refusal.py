"""Refuse a request from a middleware, whether or not its body has come, and end the connection."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.error_replies import reply_of
from server.errors import row_of
from server.request_log import record_of

_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20


def brings_body(scope: Scope) -> bool:
    """Whether the request's head announces a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def refuse(
    scope: Scope, receive: Receive, send: Send, error: Exception, *, linger: bool = True
) -> None:
    """Answer ``error``. Where a body is still on its way, close the connection after the answer.

    To close while the client is still sending would make its kernel drop the answer unread
    (RFC 9112, 9.6). So the answer goes out at once, and for a moment the rest is read and thrown
    away: at most 4 MiB and two seconds of it, which costs no memory.

    Args:
        linger: False where the client is too slow to be worth the moment.
    """
    record_of(scope).failed(row_of(error).code)
    reply = reply_of(error)
    if not brings_body(scope):
        await reply(scope, receive, send)
        return
    reply.headers["connection"] = "close"
    start = {"status": reply.status_code, "headers": reply.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": reply.body, "more_body": True})
    if linger:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await _discard(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    seen_bytes = 0
    while seen_bytes < _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        seen_bytes += len(message.get("body", b""))
