"""Who is asked whether it is there, and what silence does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from engine.types import CacheShare
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.remote import ReplicaLostError
from server.watch import MISSES, WorkerWatch


class Pinged:
    """Workers that answer, are gone, or say nothing."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.gone: set[str] = set()
        self.asked: list[str] = []

    async def ping(self, worker: str) -> None:
        self.asked.append(worker)
        if worker in self.silent:
            await asyncio.Event().wait()
        if worker in self.gone:
            raise ReplicaLostError("gone")

    def draw(self, worker: str, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        raise NotImplementedError

    async def change_model(self, worker: str, change: ModelChange) -> ModelInfo | None:
        raise NotImplementedError

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        raise NotImplementedError

    async def metrics(self, workers: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watch.ASK_EVERY_S", 0.001)
    monkeypatch.setattr("server.watch.ANSWER_S", 0.01)


async def _until_asked(workers: Pinged, times: int) -> None:
    while len(workers.asked) < times:
        await asyncio.sleep(0.001)


def test_readers_of_a_silent_worker_are_told_and_others_read_on() -> None:
    async def scenario() -> None:
        workers = Pinged()
        workers.silent.add("a")
        watch = WorkerWatch(workers)
        done = asyncio.Event()

        async def read(worker: str) -> str:
            async with watch.over(worker):
                await done.wait()
            return worker

        lost = [asyncio.create_task(read("a")) for _ in range(3)]
        reading = asyncio.create_task(read("b"))
        for result in await asyncio.gather(*lost, return_exceptions=True):
            assert isinstance(result, ReplicaLostError)
        assert workers.asked.count("a") == MISSES  # once for all of its readers
        assert not reading.done()
        done.set()
        assert await reading == "b"

    asyncio.run(scenario())


def test_a_worker_that_is_back_is_watched_afresh() -> None:
    async def scenario() -> None:
        workers = Pinged()
        workers.silent.add("a")
        watch = WorkerWatch(workers)
        with pytest.raises(ReplicaLostError):
            async with watch.over("a"):
                await asyncio.Event().wait()
        workers.silent.clear()
        async with watch.over("a"):
            await _until_asked(workers, MISSES + 5)

    asyncio.run(scenario())


def test_nobody_is_asked_once_nobody_reads() -> None:
    async def scenario() -> None:
        workers = Pinged()
        watch = WorkerWatch(workers)
        async with watch.over("a"), watch.over("a"):
            await _until_asked(workers, 2)
        asked = len(workers.asked)
        await asyncio.sleep(0.01)
        assert len(workers.asked) == asked

    asyncio.run(scenario())


def test_one_that_takes_no_calls_may_finish_what_it_has() -> None:
    async def scenario() -> None:
        workers = Pinged()
        workers.gone.add("a")
        watch = WorkerWatch(workers)
        async with watch.over("a"):
            await _until_asked(workers, 3 * MISSES)

    asyncio.run(scenario())


def test_a_timeout_of_the_reader_stays_its_own() -> None:
    async def scenario() -> None:
        watch = WorkerWatch(Pinged())
        with pytest.raises(TimeoutError):
            async with watch.over("a"), asyncio.timeout(0.005):
                await asyncio.Event().wait()

    asyncio.run(scenario())
