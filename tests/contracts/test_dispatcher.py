"""What every dispatcher promises, held against each implementation.

``darkroom`` opens one: an asynchronous context manager that takes sections of the configuration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, Counter

from engine.errors import (
    ClosedError,
    InvalidRequestError,
    LimitExceededError,
    OverloadedError,
)
from engine.png import read_parameters
from engine.types import CacheDirective, CacheMode, CacheScope, CacheShare
from server.config import ServeConfig
from server.dispatch import Dispatcher
from server.errors import DeadlineTooShortError
from server.messages import (
    CacheOrder,
    Drawn,
    Failed,
    Output,
    PictureEvent,
    Queued,
    Started,
    Stepped,
)
from server.settings import Settings
from tests.serving import MODEL, a_task, collect, pixels, settings_for, tiny_config

Darkroom = Callable[..., AbstractAsyncContextManager[Dispatcher]]
PATIENCE_S = 60.0


@asynccontextmanager
async def open_local(config: ServeConfig, settings: Settings) -> AsyncIterator[Dispatcher]:
    from server.local import LocalDispatcher
    from server.worker_core import WorkerCore

    worker = WorkerCore(config, settings)
    await asyncio.to_thread(worker.open)
    dispatcher = LocalDispatcher(config, worker)
    try:
        yield dispatcher
    finally:
        await dispatcher.close(0.0)


@asynccontextmanager
async def open_routed(config: ServeConfig, settings: Settings) -> AsyncIterator[Dispatcher]:
    from tests.routed import routed

    async with routed(config, settings) as (dispatcher, _, _):
        yield dispatcher


@asynccontextmanager
async def open_traced(config: ServeConfig, settings: Settings) -> AsyncIterator[Dispatcher]:
    from server.telemetry.config import TelemetryConfig
    from server.telemetry.drawing import TracedDispatcher
    from server.telemetry.traces import Traces

    counter = Counter("spans", "", ("outcome",), registry=CollectorRegistry())
    traces = Traces(InMemorySpanExporter(), TelemetryConfig(), counter)
    async with open_local(config, settings) as dispatcher:
        yield TracedDispatcher(dispatcher, traces)
    await asyncio.to_thread(traces.close)


IMPLEMENTATIONS = {"local": open_local, "routed": open_routed, "traced": open_traced}


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def darkroom(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    plans: Path,
    tmp_path: Path,
) -> Darkroom:
    settings = settings_for(plans, tmp_path)

    def open_(**sections: Any) -> AbstractAsyncContextManager[Dispatcher]:
        config = tiny_config(tiny_checkpoint("text"), **sections)
        return IMPLEMENTATIONS[request.param](config, settings)

    return open_


def drawn(events: list[PictureEvent]) -> list[Drawn]:
    return [event for event in events if isinstance(event, Drawn)]


async def idle(dispatcher: Dispatcher) -> None:
    """Wait until nothing is queued or running."""
    async with asyncio.timeout(PATIENCE_S):
        while (load := await dispatcher.load()).running or load.queued:
            await asyncio.sleep(0.01)


async def until(kind: type[Any], events: AsyncGenerator[PictureEvent, None]) -> None:
    """Read ``events`` until the first of ``kind``."""
    async for event in events:
        if isinstance(event, kind):
            return
    raise AssertionError(f"no {kind.__name__} came")


def test_every_task_ends_once_and_tells_its_story_in_order(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            tasks = [
                a_task(index=i, seed=i, steps=4, listening=i == 0, preview_every=2)
                for i in range(3)
            ]
            events = await collect(dispatcher.draw(tasks))
        assert sorted(picture.index for picture in drawn(events)) == [0, 1, 2]
        for index in range(3):
            own = [event for event in events if event.index == index]
            assert isinstance(own[-1], Drawn)
            heard = [event for event in own if isinstance(event, Stepped)]
            started = [event for event in own if isinstance(event, Started)]
            queued = [event for event in own if isinstance(event, Queued)]
            assert own == [*queued, *started, *heard, own[-1]]
            assert len(started) == 1
            assert [event.step for event in heard] == ([] if index else [1, 2, 3, 4])
            if not index:
                assert [event.preview is not None for event in heard] == [False, True, False, False]
                assert heard[1].preview is not None
                assert pixels(heard[1].preview).shape == (128, 128, 3)

    asyncio.run(scenario())


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_picture_says_how_to_draw_it_again(darkroom: Darkroom, format: Any) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            asked = a_task(seed=None, solver="ddim", width_px=48, output=Output(format=format))
            [picture] = drawn(await collect(dispatcher.draw([asked])))
            again = a_task(seed=picture.seed, solver="ddim", width_px=48)
            bare = Output(metadata=False)
            plain = a_task(seed=picture.seed, solver="ddim", width_px=48, output=bare)
            [repeated], [without] = [
                drawn(await collect(dispatcher.draw([task]))) for task in (again, plain)
            ]
            [info] = await dispatcher.models()
        assert pixels(picture).shape == (32, 48, 3)
        assert (picture.width_px, picture.height_px, picture.format) == (48, 32, format)
        assert (picture.solver, picture.steps, picture.model) == ("ddim", 3, MODEL)
        assert picture.plan_digest == info.plan_digest
        assert picture.guidance == info.guidance_default
        assert min(picture.timings.encode_s, picture.timings.denoise_s) > 0
        parameters = read_parameters(BytesIO(picture.data))
        assert parameters is not None
        assert parameters.prompt == "a red umbrella"
        assert parameters.settings["Seed"] == str(picture.seed)
        assert read_parameters(BytesIO(without.data)) is None
        assert np.array_equal(pixels(repeated), pixels(without))
        if format == "png":
            assert np.array_equal(pixels(repeated), pixels(picture))

    asyncio.run(scenario())


def test_one_picture_of_a_request_fails_alone(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            tasks = [a_task(index=0), a_task(index=1, solver="magic"), a_task(index=2, steps=999)]
            events = await collect(dispatcher.draw(tasks))
        assert [picture.index for picture in drawn(events)] == [0]
        errors = {event.index: event.error for event in events if isinstance(event, Failed)}
        assert isinstance(errors[1], InvalidRequestError)
        assert isinstance(errors[2], LimitExceededError)
        assert errors[2].limit == 150
        assert not any("umbrella" in str(error) for error in errors.values())

    asyncio.run(scenario())


def test_closing_the_generator_frees_the_slot(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            tasks = [a_task(index=i, steps=150, listening=True) for i in range(2)]
            async with aclosing(dispatcher.draw(tasks)) as events:
                await until(Stepped, events)
            await idle(dispatcher)
            assert len(drawn(await collect(dispatcher.draw([a_task()])))) == 1

    asyncio.run(scenario())


def test_cancelling_the_reader_frees_the_slot(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            stepped = asyncio.Event()

            async def read() -> None:
                async with aclosing(dispatcher.draw([a_task(steps=150, listening=True)])) as events:
                    async for event in events:
                        if isinstance(event, Stepped):
                            stepped.set()

            reader = asyncio.create_task(read())
            await asyncio.wait_for(stepped.wait(), PATIENCE_S)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await idle(dispatcher)

    asyncio.run(scenario())


def test_what_does_not_fit_waits_its_turn_and_hears_its_place(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom(workers={"max_live": 4}) as dispatcher:
            tasks = [a_task(index=i, seed=i) for i in range(90)]
            events = await collect(dispatcher.draw(tasks))
        assert len(drawn(events)) == 90
        last = [event for event in events if event.index == 89]
        queued = [event for event in last if isinstance(event, Queued)]
        assert queued[0].position > 1
        positions = [event.position for event in queued]
        assert positions == sorted(positions, reverse=True)
        assert isinstance(last[len(queued)], Started)
        assert queued[0].steps_ahead > 0
        assert drawn(last)[0].timings.queue_s > drawn(events)[0].timings.queue_s

    asyncio.run(scenario())


def test_refusals_come_before_the_first_event_and_leave_nothing(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom(
            admission={"max_queued_steps": 50.0, "max_queued_requests": 1}
        ) as dispatcher:
            with pytest.raises(InvalidRequestError, match=MODEL):
                await anext(dispatcher.draw([a_task(), a_task(index=1, model="other")]))
            with pytest.raises(LimitExceededError):
                await anext(dispatcher.draw([a_task(index=i, steps=20) for i in range(3)]))
            late = a_task(steps=20, deadline_at_s=time.time() + 1e-4)
            with pytest.raises(DeadlineTooShortError):
                await anext(dispatcher.draw([late]))
            load = await dispatcher.load()
            assert (load.queued, load.running) == (0, 0)

    asyncio.run(scenario())


def test_past_its_bounds_it_is_overloaded_and_says_for_how_long(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom(admission={"max_queued_steps": 300.0}) as dispatcher:
            pending = [
                asyncio.create_task(collect(dispatcher.draw([a_task(steps=130)])))
                for _ in range(200)
            ]
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            refused = [task.exception() for task in done if task.exception() is not None]
            assert refused
            assert isinstance(refused[0], OverloadedError)
            assert refused[0].retry_after_s is not None
            assert refused[0].retry_after_s > 0
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await idle(dispatcher)

    asyncio.run(scenario())


def test_it_knows_its_models_and_when_it_is_ready(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            [info] = await dispatcher.models()
            readiness = await dispatcher.readiness()
            load = await dispatcher.load()
            texts = await dispatcher.metrics()
        assert (info.id, info.native_px, info.solver_default) == (MODEL, 32, "dpmpp_2m")
        assert info.guidable
        assert readiness.ready
        assert readiness.workers == 1
        assert load.steps_per_s > 0
        assert any(b"darkroom_tick_seconds" in text for _, text in texts)

    asyncio.run(scenario())


def test_closing_drains(darkroom: Darkroom) -> None:
    async def scenario() -> None:
        async with darkroom() as dispatcher:
            task = a_task(steps=20, listening=True)
            async with aclosing(dispatcher.draw([task])) as events:
                await until(Stepped, events)
                closing = asyncio.create_task(dispatcher.close(PATIENCE_S))
                await asyncio.sleep(0)
                with pytest.raises(ClosedError):
                    await anext(dispatcher.draw([a_task()]))
                assert (await dispatcher.readiness()).draining
                assert len(drawn([event async for event in events])) == 1
            await closing

    asyncio.run(scenario())


def test_the_workers_caches_are_looked_into_and_cleared(darkroom: Darkroom) -> None:
    def order(action: Any, **scope: Any) -> CacheOrder:
        return CacheOrder(action=action, scope=CacheScope(**scope), best=1)

    async def held(dispatcher: Dispatcher, states: int) -> tuple[CacheShare, ...]:
        """What the one worker holds once it is ``states`` in all: no picture waits for writes."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                [answer] = await dispatcher.ask_caches(order("look"))
                assert answer.shares is not None
                if sum(share.states for share in answer.shares) == states:
                    return answer.shares
                await asyncio.sleep(0.01)

    async def scenario() -> None:
        async with darkroom() as dispatcher:
            exact = CacheDirective(mode=CacheMode.EXACT)
            tasks = [
                replace(a_task(index=i, seed=i, cache=exact), tenant=tenant)
                for i, tenant in enumerate(("ada", "ada", "bob"))
            ]
            await collect(dispatcher.draw(tasks))
            shares = await held(dispatcher, states=3)
            [info] = await dispatcher.models()
            assert {share.tenant: share.states for share in shares} == {"ada": 2, "bob": 1}
            assert {share.checkpoint for share in shares} == {info.checkpoint}
            assert all(len(share.best) == 1 for share in shares)
            [nothing] = await dispatcher.ask_caches(order("clear", checkpoint="other"))
            assert nothing.shares == ()
            [answer] = await dispatcher.ask_caches(
                order("clear", tenant="ada", checkpoint=info.checkpoint)
            )
            [cleared] = answer.shares or ()
            assert (cleared.tenant, cleared.entries, cleared.states) == ("ada", 2, 2)
            [left] = await held(dispatcher, states=1)
            assert left.tenant == "bob"

    asyncio.run(scenario())
