"""The router behind asyncio: streams, places, what is given up and what is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from engine.errors import InvalidRequestError, OverloadedError
from server.config import ModelConfig, ServeConfig
from server.messages import ModelChange
from server.router import Router
from server.routing import Expired, Grant, Place, Refused, RouterNews, Ticket
from server.switched import NOTHING, Switched
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import model, report, ticket

SERVES_M = ServeConfig.model_validate({"models": [{"id": "m"}]})
ADDED = NOTHING.with_model(ModelChange(action="add", model=ModelConfig(id="new"), at_s=100.0))
REMOVED = NOTHING.with_model(ModelChange(action="remove", model=ModelConfig(id="new"), at_s=101.0))
BOTH = (model("m"), model("new"))
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


def test_what_can_begin_at_once_is_granted_in_one_answer() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        await router.report(report())
        tickets = [ticket(id="a"), ticket(id="b")]
        assert await router.enter(tickets, []) == (Grant(tickets[0], "w"), Grant(tickets[1], "w"))

    asyncio.run(scenario())


def test_what_ended_makes_room_for_what_enters() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        await router.report(report())
        assert len(await router.enter([wide("first")], [])) == 1
        assert await router.enter([wide("second")], []) == ()
        assert len(await router.enter([wide("third")], ["first"])) == 1

    asyncio.run(scenario())


def test_what_cannot_begin_at_once_is_not_kept_and_waits_by_its_arrival() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        router = Router(ServeConfig(), clock=clock)
        await router.report(report())
        both = [wide("a"), wide("b")]
        assert await router.enter(both, []) == (Grant(both[0], "w"),)
        clock.tick(1.0)
        later = router.admit([wide("later", arrived_at_s=clock.now_s())], False)
        assert await anext(later) == Place("later", 1, 0)  # nothing was left in the queue
        waiting = router.admit([replace(both[1], resumed=True)], False)
        assert await anext(waiting) == Place("b", 1, 0)
        await router.heartbeat("g", [], ["a"])
        assert await anext(waiting) == Grant(replace(both[1], resumed=True), "w")
        await waiting.aclose()
        await later.aclose()

    asyncio.run(scenario())


def test_nobody_enters_past_those_who_wait() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        await router.report(report())
        await router.enter([wide("first")], [])
        waiting = router.admit([wide("second")], False)
        assert await anext(waiting) == Place("second", 1, 0)
        assert await router.enter([wide("third")], ["first"]) == ()
        assert await anext(waiting) == Grant(wide("second"), "w")
        await waiting.aclose()

    asyncio.run(scenario())


def test_what_ended_makes_room_also_where_who_tells_it_is_refused() -> None:
    async def scenario() -> None:
        config = ServeConfig.model_validate({"admission": {"max_queued_steps": 50}})
        router = Router(config, clock=FakeClock())
        await router.report(report())
        await router.enter([wide("first")], [])
        waiting = router.admit([wide("second")], False)
        assert await anext(waiting) == Place("second", 1, 0)
        [refusal] = await router.enter([wide("third")], ["first"])
        assert isinstance(refusal, Refused)
        assert await anext(waiting) == Grant(wide("second"), "w")
        await waiting.aclose()

    asyncio.run(scenario())


def test_a_stream_that_ends_late_takes_nothing_from_one_that_came_after_it() -> None:
    async def scenario() -> None:
        router = Router(ServeConfig(), clock=FakeClock())
        old = router.admit([wide("a")], False)
        await anext(old)
        await router.report(report())  # grants it, and nobody hears
        assert len(await router.enter([replace(wide("a"), resumed=True)], [])) == 1
        await old.aclose()
        assert (await router.heartbeat("g", [], [])).load.running == 1

    asyncio.run(scenario())


def test_entering_is_refused_as_admission_is() -> None:
    async def scenario() -> None:
        config = ServeConfig.model_validate({"admission": {"max_queued_steps": 50}})
        router = Router(config, clock=FakeClock())
        waiting = router.admit([ticket(40.0)], False)
        reading = asyncio.create_task(anext(waiting))
        await asyncio.sleep(0)
        [refusal] = await router.enter([ticket(40.0)], [])
        assert isinstance(refusal, Refused)
        assert isinstance(refusal.error, OverloadedError)
        assert b'reason="queue"} 1.0' in router.metrics_text()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await waiting.aclose()

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
        assert b'reason="queue"} 1.0' in router.metrics_text()
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


async def published(router: Router, switched: Switched = NOTHING) -> list[str]:
    return [info.id for info in (await router.heartbeat("g", [], [], switched)).models]


def test_an_added_model_is_published_once_it_counts_and_stays_when_a_worker_lacks_it() -> None:
    async def scenario() -> None:
        router = Router(SERVES_M, clock=FakeClock())
        await router.report(report("w1", models=BOTH))
        assert await published(router) == ["m"]  # no gateway has said that all workers have it
        assert await published(router, ADDED) == ["m", "new"]
        for _ in range(2):  # whoever reported last decides nothing
            reply = await router.report(report("w2", models=(model("m"),)))
            assert reply.switched == ADDED
            assert await published(router) == ["m", "new"]
            await router.report(report("w1", models=BOTH))
        await router.lose("w1")
        assert await published(router) == ["m", "new"]

    asyncio.run(scenario())


def test_tickets_of_an_added_model_go_to_workers_that_have_it_and_wait_for_one() -> None:
    async def scenario() -> None:
        router = Router(SERVES_M, clock=FakeClock())
        await router.report(report("w1", models=BOTH))
        await router.report(report("w2", models=(model("m"),)))
        await router.heartbeat("g", [], [], ADDED)
        tickets = [ticket(model="new", width=4.0) for _ in range(4)]
        assert {news.worker for news in await said(router.admit(tickets, False))} == {"w1"}  # type: ignore[union-attr]
        await router.lose("w1")
        waiting = router.admit([ticket(id="a", model="new")], False)
        assert isinstance(await anext(waiting), Place)
        await router.report(report("w2", models=BOTH))
        assert [news.worker for news in await said(waiting)] == ["w2"]  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_a_new_router_learns_of_an_added_model_from_gateways_and_from_workers() -> None:
    async def scenario() -> None:
        told = Router(SERVES_M, clock=FakeClock())
        await told.report(report("w1", models=BOTH))
        assert await published(told, ADDED) == ["m", "new"]
        heard = Router(SERVES_M, clock=FakeClock())
        await heard.report(report("w1", models=BOTH, switched=ADDED))
        pulse = await heard.heartbeat("g", [], [])
        assert [info.id for info in pulse.models] == ["m", "new"]
        assert pulse.switched == ADDED

    asyncio.run(scenario())


def test_a_removed_model_is_published_no_more_and_what_waits_for_it_is_told() -> None:
    async def scenario() -> None:
        router = Router(SERVES_M, clock=FakeClock())
        await router.report(report("w1", models=BOTH, rates={}))
        await router.heartbeat("g", [], [], ADDED)
        await said(router.admit([ticket(model="m")], False))  # fills it
        waiting = router.admit([ticket(model="new")], False)
        assert isinstance(await anext(waiting), Place)
        assert await published(router, REMOVED) == ["m"]
        assert await published(router, ADDED) == ["m"]  # an older word changes nothing
        router.tick()
        [refused] = await said(waiting)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, InvalidRequestError)

    asyncio.run(scenario())
