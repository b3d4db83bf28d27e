"""All faults of the noise cache's Redis in turn, while eight requests a second come in.

Arrivals do not wait for answers. ``pytest -s`` prints what each fault did to outcomes and times.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import redis

from cache.connection import RedisSettings
from cache.keys import PREFIX
from cache.redis import RedisNoiseCache
from engine.compile.plan import Plan
from engine.engine import Engine, EngineConfig
from engine.model import Model
from engine.ports import JumpTable, ReuseProfile, StateKind
from engine.reuse_noise import NoiseReuseConfig
from engine.runtime.base import Runtime
from engine.types import CacheDirective, CacheMode, GenerateRequest, ReuseOutcome
from tests.old_redis import old_redis
from tests.redis_server import RedisServer

pytestmark = pytest.mark.full

PER_S = 8.0
FAULT_S = 3.0
RECOVERY_S = 60.0
BUDGET_S = 0.25
SLACK_S = 1.0
"""What a machine of two busy cores may take to wake a thread whose budget is over."""
FINISHED = ReuseProfile(jumps=JumpTable(((0.9, 0.5),)), kind=StateKind.CLEAN, fractions=(1.0,))
ASKED = CacheDirective(mode=CacheMode.APPROXIMATE)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One finished request."""

    outcome: ReuseOutcome
    cache_s: float
    total_s: float


class OpenLoop:
    """Sends :data:`PER_S` requests a second until closed, each known by when it was sent."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sent: list[Future[Drawn]] = []
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def during(self, seconds: float) -> list[Drawn]:
        """All requests that are sent in the next seconds, finished; a failure is raised."""
        first = len(self._sent)
        time.sleep(seconds)
        drawn = [future.result(60) for future in self._sent[first:]]
        assert len(drawn) >= 0.9 * PER_S * seconds, "the load was not the one meant"
        return drawn

    def until(self, outcome: ReuseOutcome) -> float:
        """Seconds until a request that was sent from now on ends like this; it must."""
        began_s, seen = time.monotonic(), len(self._sent)
        while time.monotonic() < began_s + RECOVERY_S:
            if len(self._sent) > seen:
                if self._sent[seen].result(60).outcome is outcome:
                    return time.monotonic() - began_s
                seen += 1
            else:
                time.sleep(0.01)
        raise AssertionError(f"no {outcome} within {RECOVERY_S:g} s")

    def close(self) -> list[Drawn]:
        """Send no more; every request that was ever sent, finished."""
        self._closing.set()
        self._thread.join()
        self._pool.shutdown()
        return [future.result(0) for future in self._sent]

    def _send(self) -> None:
        due_s = time.monotonic()
        while not self._closing.wait(max(0.0, due_s - time.monotonic())):
            self._sent.append(self._pool.submit(self._draw, len(self._sent)))
            due_s += 1.0 / PER_S

    def _draw(self, number: int) -> Drawn:
        began_s = time.monotonic()
        # Every other one is a prompt of its own, so that the cache is written to all the time.
        prompt = "a dog" if number % 2 else f"the photo {number} of house {number}"
        asked = GenerateRequest(prompt=prompt, seed=number, steps=4, solver="ddim", cache=ASKED)
        picture = self._engine.submit(asked, tenant="ada").result(60)
        assert picture.reuse is not None
        total_s = time.monotonic() - began_s
        return Drawn(picture.reuse.outcome, picture.timings.cache_s, total_s)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def cache(server: RedisServer) -> Iterator[RedisNoiseCache]:
    settings = RedisSettings(url=server.url, timeout_s=0.2, probe_timeout_s=0.3)
    opened = RedisNoiseCache(settings, poll_s=0.05, limit_bytes=2**20)
    yield opened
    opened.close()


@pytest.fixture
def load(
    cache: RedisNoiseCache, tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime
) -> Iterator[OpenLoop]:
    engine = Engine(
        config=EngineConfig(noise_reuse=NoiseReuseConfig(profile=FINISHED, budget_s=BUDGET_S)),
        noise_cache=cache,
    )
    engine.load(Model.open(tiny_plan("text"), cpu_runtime))
    engine.start()
    running = OpenLoop(engine)
    yield running
    running.close()
    engine.close(drain=False)


def test_no_fault_fails_a_request_and_each_heals_by_itself(
    load: OpenLoop, cache: RedisNoiseCache, server: RedisServer
) -> None:
    load.until(ReuseOutcome.HIT)
    calm = load.during(FAULT_S)
    tell("calm", calm, 0.0)
    for name, fault in FAULTS.items():
        before = cache.statistics()
        with fault(server):
            drawn = load.during(FAULT_S)
        tell(name, drawn, load.until(ReuseOutcome.HIT))
        after = cache.statistics()
        assert after.available
        # Nothing of the engine's own broke, and nobody waited for longer than the budget.
        assert {one.outcome for one in drawn} <= {
            ReuseOutcome.HIT,
            ReuseOutcome.MISS,
            ReuseOutcome.SLOW,
        }
        assert max(one.cache_s for one in drawn) < BUDGET_S + SLACK_S
        if name in ("killed", "paused", "an old version"):
            misses = sum(one.outcome is not ReuseOutcome.HIT for one in drawn)
            assert misses >= len(drawn) / 2
            lost = after.errors + after.timeouts + after.skipped
            assert lost > before.errors + before.timeouts + before.skipped
        if name == "corrupt bytes":
            assert after.corrupt > before.corrupt
    everything = load.close()
    assert sum(one.outcome is ReuseOutcome.HIT for one in everything) > len(everything) / 4


# ---------------------------------------------------------------------- faults


@contextlib.contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@contextlib.contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    server.pause()
    yield
    server.resume()


@contextlib.contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """Others have taken what there was, and nobody evicts."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 300_000)
        with contextlib.suppress(redis.exceptions.OutOfMemoryError):
            for i in range(10_000):
                client.set(f"others:{i}", b"x" * 1000)
        yield
        client.config_set("maxmemory", 0)


@contextlib.contextmanager
def flushed(server: RedisServer) -> Iterator[None]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    yield


@contextlib.contextmanager
def old_version(server: RedisServer) -> Iterator[None]:
    server.kill()
    with old_redis(server.port):
        yield
    server.start()


@contextlib.contextmanager
def corrupt_bytes(server: RedisServer) -> Iterator[None]:
    """Every state that is there now is overwritten."""
    with redis.Redis.from_url(server.url) as client:
        for name in cast(list[bytes], client.keys(f"{PREFIX}:*:states")):
            for field in cast(list[bytes], client.hkeys(name.decode())):
                if field.startswith(b"s:"):
                    client.hset(name.decode(), field.decode(), b"not a state")
    yield


FAULTS: dict[str, Callable[[RedisServer], contextlib.AbstractContextManager[None]]] = {
    "killed": killed,
    "paused": paused,
    "full": full,
    "flushed": flushed,
    "an old version": old_version,
    "corrupt bytes": corrupt_bytes,
}


def tell(name: str, drawn: list[Drawn], healed_s: float) -> None:
    """What happened, for people to read."""
    outcomes = ", ".join(f"{n} {o.value}" for o, n in Counter(d.outcome for d in drawn).items())
    looks, totals = (
        sorted(values) for values in zip(*((d.cache_s, d.total_s) for d in drawn), strict=True)
    )
    print(
        f"{name}: {len(drawn)} requests ({outcomes}); look {looks[len(looks) // 2] * 1e3:.1f} ms,"
        f" at most {looks[-1] * 1e3:.0f} ms; picture at most {totals[-1] * 1e3:.0f} ms;"
        f" first hit {healed_s:.1f} s after"
    )
