"""Whom a gateway asks about the caches in the workers' memory, and when it cannot tell whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from engine.errors import BackendUnavailableError
from engine.types import CacheScope
from server.config import ServeConfig
from server.messages import CacheOrder
from server.ray_dispatch import RayDispatcher
from server.remote import ReplicaLostError
from server.router import Router
from server.routing import Grant, Pulse, Refused, RouterNews, Ticket
from server.serve_clients import ServeWorkersClient
from server.switched import Switched
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import report
from tests.unit.server.test_worker_caches import Caching

CLEAR = CacheOrder(action="clear", scope=CacheScope(tenant="ada"))


class Routers:
    """One router after the other, or for a while none."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.away = False
        self.start_another()

    def start_another(self) -> None:
        self.now = Router(ServeConfig(), clock=self._clock)

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        if self.away:
            raise ReplicaLostError("away")
        return await self.now.heartbeat(gateway, running, ended, switched)

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        raise NotImplementedError

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        raise NotImplementedError

    async def lose(self, worker: str) -> None:
        raise NotImplementedError

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        raise NotImplementedError


class Fleet:
    """A gateway, workers ``a`` and ``b`` with a picture each, and routers."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.routers = Routers(self.clock)
        self.workers = Caching("a", "b")
        self.gateway = self.another_gateway()

    def another_gateway(self) -> RayDispatcher:
        return RayDispatcher(ServeConfig(), self.routers, self.workers, clock=self.clock)

    async def report(self, *names: str) -> None:
        for name in names:
            await self.routers.now.report(report(name))

    async def cleared(self) -> dict[str, bool]:
        """Whether each worker that was asked has answered."""
        answers = await self.gateway.ask_caches(CLEAR)
        return {answer.worker: answer.shares is not None for answer in answers}

    def held(self) -> int:
        return sum(cache.statistics().states for cache in self.workers.caches.values())


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_all_that_report_are_asked(fleet: Fleet) -> None:
    async def scenario() -> None:
        await fleet.report("a", "b")
        assert await fleet.cleared() == {"a": True, "b": True}
        assert fleet.held() == 0

    asyncio.run(scenario())


def test_before_any_worker_has_reported_nothing_is_taken_for_cleared(fleet: Fleet) -> None:
    async def scenario() -> None:
        with pytest.raises(BackendUnavailableError, match="ask again"):
            await fleet.cleared()
        await fleet.report("a", "b")
        await fleet.gateway.load()
        fleet.routers.start_another()
        with pytest.raises(BackendUnavailableError, match="ask again"):
            await fleet.cleared()
        assert fleet.held() == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("heard_before", [False, True])
def test_without_a_router_nothing_is_taken_for_cleared(fleet: Fleet, heard_before: bool) -> None:
    async def scenario() -> None:
        await fleet.report("a", "b")
        if heard_before:
            await fleet.gateway.load()
        fleet.routers.away = True
        with pytest.raises(BackendUnavailableError, match="does not answer"):
            await fleet.cleared()
        assert fleet.held() == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["the router has just started", "another gateway has lost it"])
def test_a_worker_that_is_off_the_list_is_asked_while_it_may_live(fleet: Fleet, why: str) -> None:
    async def scenario() -> None:
        await fleet.report("a", "b")
        await fleet.gateway.load()
        if why == "the router has just started":
            fleet.routers.start_another()
            await fleet.report("a")
        else:
            await fleet.routers.now.lose("b")
            await fleet.report("a", "b")
        pulse = await fleet.routers.now.heartbeat("other", [], [])
        assert pulse.workers == ("a",)
        assert await fleet.cleared() == {"a": True, "b": True}
        assert fleet.held() == 0
        fleet.workers.gone.add("b")
        assert await fleet.cleared() == {"a": True}

    asyncio.run(scenario())


def test_a_worker_is_forgotten_in_the_end(fleet: Fleet) -> None:
    async def scenario() -> None:
        await fleet.report("a", "b")
        await fleet.gateway.load()
        fleet.routers.start_another()
        fleet.clock.tick(3600)
        await fleet.report("a")
        assert await fleet.cleared() == {"a": True}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ActorUnavailableError("cut off", None), TimeoutError),
        (ActorDiedError(), ReplicaLostError),
    ],
)
def test_a_worker_that_cannot_be_reached_is_not_taken_for_gone(
    raised: Exception, told: type[Exception]
) -> None:
    async def ask(*_: Any, **__: Any) -> None:
        raise raised

    class Handle(SimpleNamespace):
        def options(self, **_: Any) -> Handle:
            return self

    handle: Any = Handle(ask_cache=SimpleNamespace(remote=ask))
    with pytest.raises(told):
        asyncio.run(ServeWorkersClient(handle).ask_cache("a", CLEAR))
