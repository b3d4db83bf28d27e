"""What a gateway does when a worker or the router dies, with plain calls instead of Ray.

The same with real processes and kill -9 is in ``tests/faults``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ClosedError
from server.errors import WorkerLostError
from server.messages import Drawn, Failed, PictureEvent, Queued, Started, Stepped
from server.ray_dispatch import RayDispatcher
from tests.routed import RouterProcess, WorkerProcesses, routed
from tests.serving import a_task, collect, pixels, settings_for, tiny_config

Cluster = Callable[
    ..., AbstractAsyncContextManager[tuple[RayDispatcher, RouterProcess, WorkerProcesses]]
]
PATIENCE_S = 60.0


@pytest.fixture
def cluster(tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path) -> Cluster:
    settings = settings_for(plans, tmp_path)

    def open_(count: int = 1, **sections: Any) -> Any:
        config = tiny_config(tiny_checkpoint("text"), **sections)
        return routed(config, settings, workers=count)

    return open_


def drawn(events: list[PictureEvent]) -> dict[int, Drawn]:
    return {event.index: event for event in events if isinstance(event, Drawn)}


def test_pictures_of_a_dead_worker_are_finished_elsewhere_from_where_they_stood(
    cluster: Cluster,
) -> None:
    async def scenario() -> None:
        snapshots = {"workers": {"snapshot_every_s": 1e-6}}
        async with cluster(2, **snapshots) as (dispatcher, _, workers):
            tasks = [a_task(index=i, seed=i, steps=60, listening=True) for i in range(4)]
            calm = drawn(await collect(dispatcher.draw(tasks)))
            tasks = [a_task(index=i, seed=i, steps=60, listening=True) for i in range(4)]
            events: list[PictureEvent] = []
            victim, far = "", -1
            async with aclosing(dispatcher.draw(tasks)) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Stepped) and event.step == 5 and not victim:
                        on = {e.index: e.worker for e in events if isinstance(e, Started)}
                        victim, far = on[event.index], event.index
                        workers.kill(victim)
            pictures = drawn(events)
            assert sorted(pictures) == [0, 1, 2, 3]
            moved = [i for i, picture in pictures.items() if picture.attempts == 2]
            assert moved
            assert all(pictures[index].worker != victim for index in moved)
            for index, picture in pictures.items():
                assert np.array_equal(pixels(picture), pixels(calm[index]))
            resumed = [task for _, task in workers.drawn if task.id.endswith("~2")]
            # What the worker had not begun goes elsewhere too, still on its first attempt.
            assert {task.index for task in resumed} >= set(moved)
            # Others on that worker may have had no step yet, and so no snapshot.
            assert all(task.snapshot is not None for task in resumed if task.index == far)
            starts = [e.attempt for e in events if isinstance(e, Started) and e.index == moved[0]]
            assert starts == [1, 2]

    asyncio.run(scenario())


def test_what_a_worker_sends_that_was_given_up_arrives_nowhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.watch.ASK_EVERY_S", 0.05)
    monkeypatch.setattr("server.watch.ANSWER_S", 0.2)

    async def scenario() -> None:
        async with cluster(2) as (dispatcher, _, workers):
            calm = drawn(await collect(dispatcher.draw([a_task(seed=7, steps=60)])))
            events = []
            victim = ""
            async with aclosing(
                dispatcher.draw([a_task(seed=7, steps=60, listening=True)])
            ) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Stepped) and not victim:
                        [victim] = [e.worker for e in events if isinstance(e, Started)]
                        workers.cut_off(victim)
                    if isinstance(event, Started) and event.attempt == 2:
                        workers.reconnect(victim)  # with every step, and the picture, on its way
            [picture] = drawn(events).values()
            assert (picture.attempts, picture.worker != victim) == (2, True)
            assert [type(event) for event in events].count(Drawn) == 1
            assert np.array_equal(pixels(picture), pixels(calm[0]))

    asyncio.run(scenario())


def test_a_second_death_is_told(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with cluster(2) as (dispatcher, _, workers):
            events = []
            async with aclosing(dispatcher.draw([a_task(steps=150, listening=True)])) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Started):
                        workers.kill(event.worker)
            last = events[-1]
            assert isinstance(last, Failed)
            assert isinstance(last.error, WorkerLostError)

    asyncio.run(scenario())


def test_workers_that_were_dead_before_it_came_are_no_deaths_of_a_picture(
    cluster: Cluster,
) -> None:
    async def scenario() -> None:
        async with cluster(4) as (dispatcher, _, workers):
            calm = drawn(await collect(dispatcher.draw([a_task(seed=7, steps=60)])))
            before = len(workers.drawn)
            events = []
            async with aclosing(
                dispatcher.draw([a_task(seed=7, steps=60, listening=True)])
            ) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Started) and event.attempt == 1:
                        others = [name for name in workers.workers if name != event.worker]
                        for name in [event.worker, *others[:2]]:
                            workers.kill(name)
            [picture] = drawn(events).values()
            sent_to = [name for name, _ in workers.drawn[before:]]
            assert len(sent_to) == len(set(sent_to)) >= 2
            assert picture.attempts == 2
            assert np.array_equal(pixels(picture), pixels(calm[0]))

    asyncio.run(scenario())


def test_a_picture_that_nobody_takes_is_given_up(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with cluster(4) as (dispatcher, _, workers):
            for name in workers.workers:
                workers.kill(name)
            events = await collect(dispatcher.draw([a_task(steps=60)]))
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, WorkerLostError)

    asyncio.run(scenario())


def test_a_new_router_disturbs_nobody_and_keeps_the_queue(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with cluster() as (dispatcher, router, _):
            tasks = [a_task(index=i, seed=i, steps=30, listening=True) for i in range(40)]
            events = []
            restarted = False
            async with aclosing(dispatcher.draw(tasks)) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Stepped) and not restarted:
                        restarted = True
                        assert any(isinstance(event, Queued) for event in events)
                        await router.restart()
            pictures = drawn(events)
            assert len(pictures) == 40
            assert all(picture.attempts == 1 for picture in pictures.values())

    asyncio.run(scenario())


def test_when_the_time_to_drain_is_over_clients_are_told(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with cluster() as (dispatcher, _, _):
            tasks = [a_task(index=i, steps=150, listening=True) for i in range(2)]
            reading = asyncio.create_task(collect(dispatcher.draw(tasks)))
            while not (await dispatcher.load()).running:
                await asyncio.sleep(0.01)
            await dispatcher.close(0.0)
            events = await reading
            ends = [event for event in events if isinstance(event, Failed)]
            assert len(ends) == 2
            assert all(isinstance(event.error, ClosedError) for event in ends)

    asyncio.run(scenario())
