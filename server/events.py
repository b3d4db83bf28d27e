"""A dispatcher's events, opened so far that a refusal can still become an HTTP status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from server.messages import PictureEvent

FIRST_EVENT_S = 5.0
"""A dispatcher that has said nothing for so long has admitted the request: it is retrying."""


class OpenedEvents:
    """The events of an admitted request. Whoever has it must close it."""

    def __init__(
        self,
        events: AsyncGenerator[PictureEvent, None],
        first: asyncio.Task[PictureEvent] | None,
    ) -> None:
        self._events = events
        self._first = first

    def __aiter__(self) -> OpenedEvents:
        return self

    async def __anext__(self) -> PictureEvent:
        if self._first is not None:
            first, self._first = self._first, None
            return await first
        return await anext(self._events)

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._events.aclose()


async def opened(
    events: AsyncGenerator[PictureEvent, None], *, timeout_s: float = FIRST_EVENT_S
) -> OpenedEvents:
    """Wait for the first event, or for ``timeout_s``: refusals come before either.

    Raises:
        DarkroomError: the refusal.
    """

    async def next_event() -> PictureEvent:
        return await anext(events)

    first = asyncio.create_task(next_event())
    try:
        done, _ = await asyncio.wait({first}, timeout=timeout_s)
        if done and (error := first.exception()) is not None:
            raise error
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    return OpenedEvents(events, first)
