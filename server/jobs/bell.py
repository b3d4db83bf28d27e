"""Wakes whoever waits for news of a job in this process."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress


class Bell:
    """Any number of waiters for each name; a ring wakes all that wait at that moment."""

    def __init__(self) -> None:
        self._waiters: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def ring(self, name: str) -> None:
        """Wake the waiters of ``name``."""
        for waiter in self._waiters.pop(name, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, name: str, timeout_s: float) -> None:
        """Return at the next ring, at the latest after ``timeout_s``."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[name].add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await waiter
        finally:
            waiters = self._waiters.get(name)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[name]
