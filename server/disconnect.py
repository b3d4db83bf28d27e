"""Work that ends when the client who asked for it goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from engine.errors import CancelledError

_T = TypeVar("_T")


async def gone(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def until_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Await ``work``, and cancel it when the client goes first.

    Returns only after ``work`` has cleaned up behind itself.

    Raises:
        CancelledError: the client went.
    """
    working = asyncio.create_task(work)
    listening = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CancelledError("the client closed the connection")
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)
