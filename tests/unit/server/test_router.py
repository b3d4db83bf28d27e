"""The router behind asyncio: streams, places, what is given up and what is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine.errors import OverloadedError
from server.config import ServeConfig
from server.router import Router
from server.routing import Expired, Grant, Place, Refused, RouterNews, Ticket
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import report, ticket

WIDE = 16.0
"""Fills a worker."""


async def said(stream: AsyncGenerator[RouterNews, None]) -> list[RouterNews]:
    async with aclosing(stream):
        return [news async for news in stream]


def names(news: list[RouterNews]) -> list[str]:
    return [type(item).__name__ for item in news]


def wide(id: str, **keys: float) -> Ticket:
    return ticket(id=id, width=WIDE, **keys)  # type: ignore[arg-type]


def test_a_free_worker_is_granted_at_once() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        await router.report(report())
        tickets = [ticket(id="a"), ticket(id="b")]
        grants = await said(router.admit(tickets, True))
        assert grants == [Grant(tickets[0], "w"), Grant(tickets[1], "w")]

    asyncio.run(scenario())


def test_who_waits_hears_the_place_and_then_the_grant() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        await router.report(report())
        await said(router.admit([wide("first")], False))
        second = router.admit([wide("second")], False)
        assert await anext(second) == Place("second", 1, 0)
        third = router.admit([wide("third")], True)
        assert await anext(third) == Place("third", 2, 40)
        await router.heartbeat("g", [], ["first"])
        assert isinstance(await anext(second), Grant)
        router.tick()
        assert await anext(third) == Place("third", 1, 0)
        await second.aclose()
        await third.aclose()

    asyncio.run(scenario())


def test_a_refusal_is_a_value_and_leaves_nothing() -> None:
    async def scenario() -> None:
        config = ServeConfig.model_validate({"admission": {"max_queued_steps": 50}})
        router = Router(config, clock=FakeClock())
        waiting = router.admit([ticket(40.0)], False)
        assert names([await anext(waiting)]) == ["Place"]
        [refusal] = await said(router.admit([ticket(40.0)], False))
        assert isinstance(refusal, Refused)
        assert isinstance(refusal.error, OverloadedError)
        pulse = await router.heartbeat("g", [], [])
        assert pulse.load.queued == 1
        assert b'reason="overloaded"} 1.0' in router.metrics_text()
        await waiting.aclose()

    asyncio.run(scenario())


def test_a_reader_that_leaves_gives_up_its_place() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        waiting = router.admit([ticket()], True)
        await anext(waiting)
        await waiting.aclose()
        assert (await router.heartbeat("g", [], [])).load.queued == 0

    asyncio.run(scenario())


def test_a_grant_that_was_never_heard_of_is_free_again() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        waiting = router.admit([wide("a")], False)
        await anext(waiting)
        await router.report(report())  # grants it
        await waiting.aclose()
        assert (await router.heartbeat("g", [], [])).load.running == 0

    asyncio.run(scenario())


def test_a_deadline_that_passes_in_the_queue_is_told() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        router = Router(ServeConfig(), clock=clock)
        waiting = router.admit([ticket(id="late", deadline_at_s=clock.now_s() + 3)], False)
        await anext(waiting)
        clock.tick(4)
        router.tick()
        assert await said(waiting) == [Expired("late")]

    asyncio.run(scenario())


def test_the_queue_of_a_silent_gateway_is_dropped_and_its_streams_end() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        router = Router(ServeConfig(), clock=clock)
        waiting = router.admit([ticket()], False)
        await anext(waiting)
        clock.tick(16)
        router.tick()
        assert await said(waiting) == []

    asyncio.run(scenario())


def test_it_says_what_is_outstanding_to_workers_and_models_to_gateways() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        waiting = router.admit([ticket(40.0), ticket(20.0)], False)
        await anext(waiting)
        reply = await router.report(report())
        assert reply.outstanding_steps == 60
        assert (await router.heartbeat("g", [], [])).workers == ("w",)
        await waiting.aclose()

    asyncio.run(scenario())
