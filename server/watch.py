"""Whether the workers that draw for a gateway can be reached.

A process that dies ends its calls. A machine that is cut off does not: packets vanish, nothing is
reset, and a stream from it stays open until Ray gives the node up, half a minute later or more. So
a gateway asks every worker that draws for it, every other second, whether it is there. One that
misses :data:`MISSES` answers in a row is lost for what it draws: the streams are left, and whatever
it may still send arrives nowhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.remote import ReplicaLostError, WorkersClient

_log = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ANSWER_S = 3.0
"""A worker answers between two of its own network calls: this is a thousand times as long."""
MISSES = 2
"""In a row: after the first, a gateway that was held up itself has had time to read the answer."""


class WorkerWatch:
    """Asks the workers that somebody reads from, and no others. Belongs to one event loop."""

    def __init__(self, workers: WorkersClient) -> None:
        self._workers = workers
        self._readers: dict[str, set[asyncio.Timeout]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def over(self, worker: str) -> AsyncIterator[None]:
        """Watch ``worker`` while the block reads from it.

        Raises:
            ReplicaLostError: it has fallen silent; whatever the block waited for was cancelled.
        """
        patience = asyncio.timeout(None)
        try:
            async with patience:
                self._begin(worker, patience)
                try:
                    yield
                finally:
                    self._end(worker, patience)
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise ReplicaLostError(f"worker {worker} does not answer") from error

    def _begin(self, worker: str, reader: asyncio.Timeout) -> None:
        self._readers.setdefault(worker, set()).add(reader)
        if worker not in self._asking:
            self._asking[worker] = asyncio.create_task(self._ask(worker))

    def _end(self, worker: str, reader: asyncio.Timeout) -> None:
        readers = self._readers.get(worker, set())
        if reader not in readers:
            return  # the worker was lost, and may be watched for others by now
        readers.remove(reader)
        if not readers:
            del self._readers[worker]
            self._asking.pop(worker).cancel()

    async def _ask(self, worker: str) -> None:
        missed = 0
        while missed < MISSES:
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self._workers.ping(worker)
                missed = 0
            except TimeoutError:
                missed += 1
                continue
            except ReplicaLostError:
                # It takes no new calls, as before it ends: its streams say what becomes of them.
                pass
            await asyncio.sleep(ASK_EVERY_S)
        _log.warning("worker %s has not answered for %.0f s", worker, MISSES * ANSWER_S)
        del self._asking[worker]
        for reader in self._readers.pop(worker):
            reader.reschedule(asyncio.get_running_loop().time())
