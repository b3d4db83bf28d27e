"""News from an engine's threads for one coroutine: in order, and bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import TypeAlias

from engine.types import Picture, Snapshot, StepEvent

MAX_STEPS = 64
"""Steps that may wait to be read; of more, the oldest are dropped: a newer one tells as much."""


class Begun:
    """The first step begins."""


News: TypeAlias = Begun | StepEvent | Snapshot | Picture | Exception


class Mailbox:
    """Any thread puts, one coroutine gets.

    A snapshot replaces the last one that was not read; a picture or an error comes last.

    Args:
        loop: of the coroutine that reads.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._news: deque[News] = deque()
        self._arrived = asyncio.Event()
        self._told = False

    def put(self, news: News) -> None:
        """Leave news; returns at once."""
        with self._lock:
            if isinstance(news, Snapshot):
                self._drop_first(Snapshot, keep=0)
            elif isinstance(news, StepEvent):
                self._drop_first(StepEvent, keep=MAX_STEPS - 1)
            self._news.append(news)
            tell, self._told = not self._told, True
        if tell:
            with suppress(RuntimeError):  # the reader's event loop is closed: nobody reads
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> News:
        """Wait for the next news."""
        while True:
            with self._lock:
                if self._news:
                    return self._news.popleft()
                self._told = False
                self._arrived.clear()
            await self._arrived.wait()

    def _drop_first(self, kind: type[Snapshot] | type[StepEvent], *, keep: int) -> None:
        found = [news for news in self._news if isinstance(news, kind)]
        if len(found) > keep:
            # By identity: snapshots hold tensors, which do not compare.
            self._news = deque(news for news in self._news if news is not found[0])
