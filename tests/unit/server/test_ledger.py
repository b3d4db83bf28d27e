"""A gateway's heartbeat: what it holds, and what ended while nobody listened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

import pytest

from server.ledger import Ledger
from server.messages import ModelInfo
from server.remote import ReplicaLostError
from server.routing import Grant, LoadTable, Pulse, Refused, RouterNews, Ticket
from server.switched import Switched
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import ticket

MODEL = ModelInfo(
    id="m",
    family="text",
    native_px=32,
    size_multiple_px=8,
    min_px=16,
    max_px=64,
    guidance_default=3.0,
    guidable=True,
    solver_default="ddim",
    schedule_default="leading",
    precision="fp32",
    backend="onnxruntime",
    plan_digest="0",
    created_s=0,
)


class Listener:
    """A router that only listens, or is away."""

    def __init__(self) -> None:
        self.away = False
        self.models: tuple[ModelInfo, ...] = (MODEL,)
        self.heard: list[tuple[list[str], list[str]]] = []
        self.takes: Callable[[], None] = lambda: None
        self.queued = 1
        self.entered: list[tuple[list[str], list[str]]] = []

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        if self.away:
            raise ReplicaLostError("away")
        self.takes()
        self.heard.append(([grant.ticket.id for grant in running], sorted(ended)))
        return Pulse(
            models=self.models, load=LoadTable(queued=self.queued * len(self.heard)), workers=("w",)
        )

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        if self.away:
            raise ReplicaLostError("away")
        self.entered.append(([ticket.id for ticket in tickets], sorted(ended)))
        return [Grant(ticket, "w") for ticket in tickets]

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        raise NotImplementedError

    async def lose(self, worker: str) -> None:
        raise NotImplementedError

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        raise NotImplementedError


def grant(id: str) -> Grant:
    return Grant(ticket(id=id), "w")


def test_what_ended_while_the_router_was_away_is_told_to_the_next_once() -> None:
    async def scenario() -> None:
        router = Listener()
        ledger = Ledger("g", router, FakeClock())
        ledger.hold(grant("a"))
        ledger.hold(grant("b"))
        await ledger.beat()
        router.away = True
        ledger.end("a")
        await ledger.beat()
        router.away = False
        await ledger.beat()
        await ledger.beat()
        assert router.heard == [(["a", "b"], []), (["b"], ["a"]), (["b"], [])]

    asyncio.run(scenario())


def test_an_end_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.ledger.HEARTBEAT_S", 3600.0)

    async def scenario() -> None:
        router = Listener()
        ledger = Ledger("g", router, FakeClock())
        ledger.start()
        ledger.hold(grant("a"))
        await ledger.first_pulse()
        ledger.end("a")
        while ([], ["a"]) not in router.heard:
            await asyncio.sleep(0.01)
        await ledger.close()

    asyncio.run(scenario())


async def moments() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def calm(router: Listener) -> Ledger:
    """A ledger that beats, of whose requests none waits, with two leases."""
    router.queued = 0
    ledger = Ledger("g", router, FakeClock())
    ledger.start()
    ledger.hold(grant("a"))
    ledger.hold(grant("b"))
    return ledger


def test_where_nobody_waits_the_next_request_tells_what_ended_and_no_beat_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.ledger.HEARTBEAT_S", 3600.0)
    monkeypatch.setattr("server.ledger._GATHER_S", 3600.0)

    async def scenario() -> None:
        router = Listener()
        ledger = calm(router)
        await ledger.first_pulse()
        assert ledger.quiet
        ledger.end("a")
        await moments()
        assert await ledger.enter([ticket(id="c")]) == [grant("c")]
        await moments()
        assert router.entered == [(["c"], ["a"])]
        assert len(router.heard) == 1
        ledger.press()  # from now on somebody waits
        ledger.end("b")
        await moments()
        assert router.heard[1:] == [([], ["b"])]
        await ledger.close()

    asyncio.run(scenario())


def test_where_nobody_comes_what_ended_is_told_after_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.ledger.HEARTBEAT_S", 3600.0)
    monkeypatch.setattr("server.ledger._GATHER_S", 0.001)

    async def scenario() -> None:
        router = Listener()
        ledger = calm(router)
        await ledger.first_pulse()
        ledger.end("a")
        async with asyncio.timeout(10.0):
            while len(router.heard) < 2:
                await asyncio.sleep(0.001)
        assert router.heard[1:] == [(["b"], ["a"])]
        await ledger.close()

    asyncio.run(scenario())


def test_it_is_not_quiet_while_somebody_waits_or_the_router_is_silent() -> None:
    async def scenario() -> None:
        router, clock = Listener(), FakeClock()
        router.queued = 0
        ledger = Ledger("g", router, clock)
        assert not ledger.quiet
        await ledger.beat()
        assert ledger.quiet
        ledger.press()
        assert not ledger.quiet
        clock.tick(1.0)
        await ledger.beat()  # by now it has its place
        assert ledger.quiet
        clock.tick(60.0)
        assert not ledger.quiet

    asyncio.run(scenario())


def test_what_ended_is_kept_where_nobody_heard_it_but_not_for_ever() -> None:
    async def scenario() -> None:
        router, clock = Listener(), FakeClock()
        ledger = Ledger("g", router, clock)
        ledger.hold(grant("old"))
        ledger.end("old")
        router.away = True
        clock.tick(61.0)
        ledger.hold(grant("a"))
        ledger.end("a")
        with pytest.raises(ReplicaLostError):
            await ledger.enter([ticket(id="c")])
        router.away = False
        await ledger.beat()
        assert router.heard == [([], ["a"])]

    asyncio.run(scenario())


def test_what_a_beat_on_its_way_calls_running_is_not_told_as_ended_in_passing_alone() -> None:
    """The beat may arrive after it, and a router that is new would take the lease for live."""

    async def scenario() -> None:
        router = Listener()
        ledger = Ledger("g", router, FakeClock())
        ledger.hold(grant("a"))
        passing = ledger.enter([ticket(id="c")])

        def overtaken() -> None:
            router.takes = lambda: None
            ledger.end("a")
            with pytest.raises(StopIteration):
                passing.send(None)

        router.takes = overtaken
        await ledger.beat()
        await ledger.beat()
        assert router.entered == [(["c"], ["a"])]
        assert router.heard[-1] == ([], ["a"])

    asyncio.run(scenario())


def test_the_first_pulse_is_one_that_knows_a_worker() -> None:
    async def scenario() -> None:
        router = Listener()
        router.models = ()
        ledger = Ledger("g", router, FakeClock())
        await ledger.beat()
        waiting = asyncio.create_task(ledger.first_pulse())
        await asyncio.sleep(0)
        assert not waiting.done()
        router.models = (MODEL,)
        await ledger.beat()
        assert (await waiting).models == (MODEL,)

    asyncio.run(scenario())


def test_the_load_is_passed_on_with_the_time_at_which_it_was_asked_for() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        told: list[tuple[LoadTable, float]] = []
        router = Listener()
        router.takes = lambda: clock.tick(0.25)
        ledger = Ledger("g", router, clock, heard=lambda load, at_s: told.append((load, at_s)))
        await ledger.beat()
        router.away = True
        await ledger.beat()
        assert told == [(LoadTable(queued=1), 100.0)]
        assert ledger.pulsed_at_s == 100.25

    asyncio.run(scenario())


def test_the_age_of_a_word_does_not_change_when_the_time_of_day_is_set_back() -> None:
    async def scenario() -> None:
        day, steady = FakeClock(), FakeClock()
        told: list[float] = []
        ledger = Ledger(
            "g", Listener(), day, steady=steady, heard=lambda _load, at_s: told.append(at_s)
        )
        await ledger.beat()
        day.tick(-3600)
        steady.tick(1)
        await ledger.beat()
        assert told == [100.0, 101.0]
        assert ledger.fresh()

    asyncio.run(scenario())


def test_a_word_is_fresh_for_a_few_seconds() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        ledger = Ledger("g", Listener(), clock)
        assert not ledger.fresh()
        await ledger.beat()
        assert ledger.fresh()
        clock.tick(6)
        assert not ledger.fresh()

    asyncio.run(scenario())
