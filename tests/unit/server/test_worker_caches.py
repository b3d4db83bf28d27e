"""Orders to the caches of several workers, of which some are silent or gone."""

from __future__ import annotations

import asyncio

from cache.memory import MemoryNoiseCache
from engine.types import CacheScope, CacheShare
from server.messages import CacheOrder
from server.remote import ReplicaLostError
from server.worker_caches import ask_everywhere, carry_out
from tests.noise import key, offer
from tests.unit.server.test_watch import Pinged


class Caching(Pinged):
    """Workers, each with a cache of one picture."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.caches = {name: MemoryNoiseCache() for name in names}
        for cache in self.caches.values():
            cache.offer(key(), offer(1))

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        if worker in self.silent:
            await asyncio.Event().wait()
        if worker in self.gone:
            raise ReplicaLostError("gone")
        return carry_out(order, self.caches[worker])


def test_the_silent_are_named_and_the_dead_are_not() -> None:
    async def scenario() -> None:
        workers = Caching("a", "b", "c")
        workers.silent.add("b")
        workers.gone.add("c")
        order = CacheOrder(action="clear", scope=CacheScope(tenant="ada"))
        answers = await ask_everywhere(workers, ("a", "b", "c"), order, timeout_s=0.01)
        assert [answer.worker for answer in answers] == ["a", "b"]
        [cleared] = answers[0].shares or ()
        assert (cleared.tenant, cleared.states) == ("ada", 2)
        assert answers[1].shares is None
        assert workers.caches["a"].statistics().states == 0
        assert workers.caches["b"].statistics().states == 2

    asyncio.run(scenario())


def test_a_worker_without_a_cache_holds_nothing() -> None:
    assert carry_out(CacheOrder(action="look", scope=CacheScope()), None) == ()
