"""From tickets to grants over a real router whose answers may be lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from engine.errors import OverloadedError
from server.config import ServeConfig
from server.ledger import Ledger
from server.ray_grants import Grants
from server.remote import ReplicaLostError
from server.router import Router
from server.routing import Grant, Place, Pulse, Refused, RouterNews, Ticket
from server.switched import Switched
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import report, ticket

WIDE = 16.0
"""Fills a worker."""


@dataclass
class Line:
    """Implements :class:`server.remote.RouterClient`, and counts the calls."""

    router: Router
    lost_answers: int = 0
    calls: list[str] = field(default_factory=list)

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        self.calls.append("enter")
        news = await self.router.enter(tickets, ended)
        await asyncio.sleep(0)  # others may enter before it is heard of
        if self.lost_answers:
            self.lost_answers -= 1
            raise ReplicaLostError("out of reach")
        return news

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        self.calls.append("admit")
        return self.router.admit(tickets, watching)

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        return await self.router.heartbeat(gateway, running, ended, switched)

    async def lose(self, worker: str) -> None:
        raise NotImplementedError

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        raise NotImplementedError


class Gateway:
    """A ledger that has heard of an idle worker, and what its requests hear."""

    def __init__(self, **admission: float) -> None:
        config = ServeConfig.model_validate({"admission": admission})
        self.clock = FakeClock()
        self.line = Line(Router(config, clock=self.clock))
        self.ledger = Ledger("g", self.line, self.clock)
        self.places: list[Place] = []
        self.left_s = 3600.0

    async def open(self) -> None:
        await self.line.router.report(report())
        await self.ledger.beat()

    def ask(self, *tickets: Ticket) -> AsyncGenerator[Grant, None]:
        async def placed(place: Place) -> None:
            self.places.append(place)

        async def late(_ticket: Ticket) -> None:
            pytest.fail("late")

        grants = Grants(
            router=self.line,
            ledger=self.ledger,
            left_s=lambda: self.left_s,
            watching=False,
            held=self.ledger.hold,
            placed=placed,
            late=late,
        )
        return grants.of(tickets)

    async def load(self) -> tuple[int, int]:
        """(waiting, running) after a beat."""
        await self.ledger.beat()
        assert self.ledger.pulse is not None
        return self.ledger.pulse.load.queued, self.ledger.pulse.load.running


async def all_of(grants: AsyncGenerator[Grant, None]) -> list[str]:
    async with aclosing(grants):
        return [grant.ticket.id async for grant in grants]


def test_what_begins_at_once_costs_one_call() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        await gateway.open()
        assert await all_of(gateway.ask(ticket(id="a"), ticket(id="b"))) == ["a", "b"]
        assert gateway.line.calls == ["enter"]
        assert await gateway.load() == (0, 2)

    asyncio.run(scenario())


def test_what_has_to_wait_gets_a_stream_and_then_everybody_does() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        await gateway.open()
        grants = gateway.ask(ticket(id="a", width=WIDE), ticket(id="b", width=WIDE))
        assert (await anext(grants)).ticket.id == "a"
        waiting = asyncio.create_task(all_of(grants))
        other = asyncio.create_task(all_of(gateway.ask(ticket(id="c", width=WIDE))))
        while len(gateway.places) < 2:
            await asyncio.sleep(0)
        assert gateway.line.calls == ["enter", "admit", "admit"]
        gateway.ledger.end("a")
        await gateway.load()
        assert await waiting == ["b"]
        gateway.ledger.end("b")
        await gateway.load()
        assert await other == ["c"]

    asyncio.run(scenario())


def test_those_that_come_in_the_same_moment_are_held_against_each_other() -> None:
    """None of them finds a queue; judged once, all of them would wait, whatever the bound."""

    async def scenario() -> None:
        gateway = Gateway(max_queued_steps=100)
        await gateway.open()
        await all_of(gateway.ask(ticket(id="first", width=WIDE)))
        crowd = [gateway.ask(ticket(40, id=f"c{i}", width=WIDE)) for i in range(5)]
        asked = [asyncio.create_task(all_of(grants)) for grants in crowd]
        while len(gateway.places) + sum(task.done() for task in asked) < 5:
            await asyncio.sleep(0)
        refused = [task for task in asked if task.done()]
        assert len(refused) == 3
        assert all(isinstance(task.exception(), OverloadedError) for task in refused)
        assert await gateway.load() == (2, 1)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert await gateway.load() == (0, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("moments", range(4))
def test_who_leaves_at_any_moment_leaves_nothing_behind(moments: int) -> None:
    async def scenario() -> None:
        gateway = Gateway()
        await gateway.open()
        asking = asyncio.create_task(anext(gateway.ask(ticket(id="a"))))
        for _ in range(moments):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        gateway.ledger.end("a")  # as its owner does with what it holds
        assert await gateway.load() == (0, 0)

    asyncio.run(scenario())


def test_an_answer_that_was_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.ray_grants._PAUSE_S", (0.0, 0.0))

    async def scenario() -> None:
        gateway = Gateway()
        await gateway.open()
        gateway.line.lost_answers = 2
        assert await all_of(gateway.ask(ticket(id="a", width=WIDE))) == ["a"]
        assert await gateway.load() == (0, 1)

    asyncio.run(scenario())


def test_who_leaves_after_an_answer_was_lost_gives_back_what_it_granted() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        await gateway.open()
        gateway.line.lost_answers = 1
        asking = asyncio.create_task(all_of(gateway.ask(ticket(id="a"))))
        while gateway.line.lost_answers:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await gateway.load() == (0, 0)

    asyncio.run(scenario())
