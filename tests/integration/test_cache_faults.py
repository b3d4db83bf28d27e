"""What becomes of requests when the noise cache's Redis fails: nothing but counted misses."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import redis

from cache.connection import IncompatibleServerError, RedisSettings
from cache.keys import PREFIX
from cache.redis import RedisNoiseCache
from engine.compile.plan import Plan
from engine.engine import Engine, EngineConfig
from engine.model import Model
from engine.ports import CacheStatistics, JumpTable, ReuseProfile, StateKind
from engine.reuse_noise import NoiseReuseConfig
from engine.runtime.base import Runtime
from engine.types import CacheDirective, CacheMode, GenerateRequest, ReuseOutcome
from tests.old_redis import old_redis
from tests.redis_server import RedisServer

FINISHED = ReuseProfile(jumps=JumpTable(((0.9, 0.5),)), kind=StateKind.CLEAN, fractions=(1.0,))
ASKED = CacheDirective(mode=CacheMode.APPROXIMATE)


class Rig:
    """An engine on a cache on a Redis, and requests of one prompt."""

    def __init__(self, engine: Engine, cache: RedisNoiseCache) -> None:
        self.engine = engine
        self.cache = cache
        self.seed = 0

    def draw(self, prompt: str = "a dog") -> ReuseOutcome:
        self.seed += 1
        asked = GenerateRequest(prompt=prompt, seed=self.seed, steps=4, solver="ddim", cache=ASKED)
        picture = self.engine.submit(asked, tenant="ada").result(60)
        assert picture.reuse is not None
        return picture.reuse.outcome

    def draw_until(self, wanted: ReuseOutcome) -> None:
        """Go on asking, as clients would, until the cache is what it was: it must get there."""
        for _ in range(600):
            if self.draw() is wanted:
                return
            time.sleep(0.02)  # the index follows Redis on a thread of its own
        raise AssertionError(f"no {wanted} in 600 requests: {self.cache.statistics()}")

    def under_load(self, fault: Callable[[], None]) -> list[ReuseOutcome]:
        """Three clients ask for eight pictures each; the fault strikes after a few of them."""
        outcomes: list[ReuseOutcome] = []
        fourth = threading.Event()

        def client() -> None:
            for _ in range(8):
                outcomes.append(self.draw())
                if len(outcomes) >= 4:
                    fourth.set()

        clients = [threading.Thread(target=client) for _ in range(3)]
        for thread in clients:
            thread.start()
        assert fourth.wait(60)
        fault()
        for thread in clients:
            thread.join()
        return outcomes

    @property
    def counts(self) -> CacheStatistics:
        return self.cache.statistics()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def rig(
    server: RedisServer, tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime
) -> Iterator[Rig]:
    settings = RedisSettings(url=server.url, timeout_s=0.2, probe_timeout_s=0.3)
    cache = RedisNoiseCache(settings, poll_s=0.01, limit_bytes=2**20)
    engine = Engine(
        config=EngineConfig(noise_reuse=NoiseReuseConfig(profile=FINISHED, budget_s=0.5)),
        noise_cache=cache,
    )
    engine.load(Model.open(tiny_plan("text"), cpu_runtime))
    cache.start()
    engine.start()
    made = Rig(engine, cache)
    made.draw_until(ReuseOutcome.HIT)
    yield made
    engine.close(drain=False)
    cache.close()


def states_on(server: RedisServer) -> str:
    with redis.Redis.from_url(server.url) as client:
        (name,) = cast(list[bytes], client.keys(f"{PREFIX}:*:states"))
        return name.decode()


def test_killed_and_started_again(rig: Rig, server: RedisServer) -> None:
    outcomes = rig.under_load(server.kill)
    assert len(outcomes) == 24
    assert rig.draw() is ReuseOutcome.MISS
    assert not rig.counts.available
    assert rig.counts.errors + rig.counts.skipped > 0
    server.start()
    rig.draw_until(ReuseOutcome.HIT)
    assert rig.counts.available
    assert rig.counts.resyncs >= 1


def test_paused(rig: Rig, server: RedisServer) -> None:
    """Connections stay and nothing answers: the calls under way time out, the rest are not made."""
    outcomes = rig.under_load(server.pause)
    assert len(outcomes) == 24
    assert set(outcomes) <= {ReuseOutcome.HIT, ReuseOutcome.MISS, ReuseOutcome.SLOW}
    assert rig.draw() is not ReuseOutcome.HIT
    assert rig.counts.timeouts >= 1
    before = rig.counts
    for _ in range(20):
        rig.draw()
    # No request waits for a server that is known to be away: only the prober's calls time out.
    assert rig.counts.skipped > before.skipped
    server.resume()
    rig.draw_until(ReuseOutcome.HIT)


def test_flushed(rig: Rig, server: RedisServer) -> None:
    def flush() -> None:
        with redis.Redis.from_url(server.url) as client:
            client.flushall()

    assert len(rig.under_load(flush)) == 24
    rig.draw_until(ReuseOutcome.HIT)
    assert rig.counts.errors == 0


def test_full_for_everybody(rig: Rig, server: RedisServer) -> None:
    """Under noeviction the cache pays for what it writes with what it has, and others' memory is
    left alone; hits go on.
    """
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 300_000)
        with contextlib.suppress(redis.exceptions.OutOfMemoryError):
            for i in range(10_000):
                client.set(f"others:{i}", b"x" * 1000)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("one more", b"x" * 1000)
        others = len(cast(list[bytes], client.keys("others:*")))
        assert rig.draw() is ReuseOutcome.HIT
        before = rig.counts
        for number in range(8):
            rig.draw(f"{number} quite another prompt {number}")
        rig.draw()
        statistics = rig.engine.reuse_statistics()
        assert statistics is not None
        assert statistics.outcomes.get(ReuseOutcome.FAILED, 0) == 0
        assert len(cast(list[bytes], client.keys("others:*"))) == others
        rig.cache.sync()
        # How many states fit depends on what Redis' own buffers take at the moment.
        paid = rig.counts.evicted + rig.counts.refused - before.evicted - before.refused
        assert paid >= 1
        client.config_set("maxmemory", 0)
    rig.draw_until(ReuseOutcome.HIT)


def test_corrupt_values_are_counted_and_dropped(rig: Rig, server: RedisServer) -> None:
    name = states_on(server)
    with redis.Redis.from_url(server.url) as client:
        for field in cast(list[bytes], client.hkeys(name)):
            if field.startswith(b"s:"):
                client.hset(name, field.decode(), b"not a state")
        assert rig.draw() is ReuseOutcome.MISS
        assert rig.counts.corrupt >= 1
        rig.draw_until(ReuseOutcome.HIT)


def test_replaced_by_an_old_version(rig: Rig, server: RedisServer) -> None:
    """Nothing is asked of a server that cannot run the scripts; the right one is taken back."""
    server.kill()
    assert rig.draw() is ReuseOutcome.MISS

    with old_redis(server.port):
        for _ in range(5):
            assert rig.draw() is ReuseOutcome.MISS
        with pytest.raises(IncompatibleServerError, match=r"6\.2\.14"):
            rig.cache.sync()
        assert not rig.counts.available
    server.start()
    rig.draw_until(ReuseOutcome.HIT)
