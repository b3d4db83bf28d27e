"""Bounds on bodies, held where the bytes arrive: nothing above has collected any of them yet.

The server below reads at most 64 KiB ahead of us (uvicorn's flow control), so what a client may
send into memory is that, plus what a route has been given within its bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import DarkroomError, InvalidRequestError, OverloadedError
from server.config import HttpConfig
from server.errors import PayloadTooLargeError, TooSlowError
from server.middleware.refusal import refuse


class BodyLimit:
    """Refuses bodies that are too large with 413 and those that come too slowly with 408.

    A declared length over the bound is refused without reading; a body that comes in chunks is
    counted. A body may make us wait ``read_timeout_s``, and as long again as its length so far
    takes at ``min_upload_bytes_per_s``. All bodies together are bounded, too: past
    ``max_bodies_bytes`` the one that would need more is put off with 429.

    Args:
        http: the bounds.
        upload_paths: prefixes of the paths whose bodies hold pictures: they may be as large as
            ``max_upload_bytes``, all others as ``max_body_bytes``.
    """

    def __init__(self, app: ASGIApp, *, http: HttpConfig, upload_paths: Sequence[str]) -> None:
        self._app = app
        self._http = http
        self._upload_paths = tuple(upload_paths)
        self._pool = _Pool(http.max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        uploads = scope["path"].startswith(self._upload_paths)
        bound = self._http.max_upload_bytes if uploads else self._http.max_body_bytes
        try:
            _check_declared(Headers(scope=scope), bound)
        except (InvalidRequestError, PayloadTooLargeError) as error:
            await refuse(scope, receive, send, error)
            return
        body = _Body(scope, receive, send, bound=bound, http=self._http, pool=self._pool)
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            body.release()


def _check_declared(headers: Headers, bound: int) -> None:
    text = headers.get("content-length")
    if text is None:
        return
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequestError("Content-Length is not a whole number", field="content-length")
    if len(text) > 18 or int(text) > bound:
        raise _too_large(bound)


@dataclass(slots=True)
class _Pool:
    """Bytes of the bodies of all requests that are not yet answered."""

    bound: int
    held: int = 0


class _Body:
    """One request's body on its way in, and the right to answer in the application's place."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        bound: int,
        http: HttpConfig,
        pool: _Pool,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._bound = bound
        self._http = http
        self._pool = pool
        self._seen_bytes = 0
        self._waited_s = 0.0
        self._complete = False
        self._answered = False
        self._refused = False

    async def receive(self) -> Message:
        """The next part, if it keeps within the bounds; otherwise the end of the connection."""
        if self._refused:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        try:
            message = await self._next()
        except DarkroomError as error:
            await self._refuse(error)
            return {"type": "http.disconnect"}
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on what the application says, unless it was answered in its place."""
        if self._refused:
            return
        self._answered = True
        await self._send(message)

    def release(self) -> None:
        """The request is over, and its body with it."""
        self._pool.held -= self._seen_bytes
        self._seen_bytes = 0

    async def _next(self) -> Message:
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        excused_s = self._seen_bytes / self._http.min_upload_bytes_per_s
        try:
            async with asyncio.timeout(self._http.read_timeout_s + excused_s - self._waited_s):
                message = await self._receive()
        except TimeoutError:
            raise TooSlowError(
                f"the body came too slowly: at least {self._http.min_upload_bytes_per_s:g} bytes a"
                f" second after {self._http.read_timeout_s:g} s"
            ) from None
        self._waited_s += clock.time() - began_s
        part_bytes = len(message.get("body", b""))
        self._seen_bytes += part_bytes
        self._pool.held += part_bytes
        if self._seen_bytes > self._bound:
            raise _too_large(self._bound)
        if self._pool.held > self._pool.bound:
            raise OverloadedError("too many bodies are being read at once", retry_after_s=1.0)
        return message

    async def _refuse(self, error: DarkroomError) -> None:
        self._refused = True
        if not self._answered:
            slow = isinstance(error, TooSlowError)
            await refuse(self._scope, self._receive, self._send, error, linger=not slow)


def _too_large(bound: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than {bound} bytes, the bound of this path")
