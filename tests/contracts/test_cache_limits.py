"""What must hold whatever happens: the byte limit among many writers, and tenants kept apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.connection import RedisSettings
from cache.keys import namespace_of
from cache.memory import MemoryNoiseCache
from cache.policy import POLICIES, policy_named
from cache.redis import RedisNoiseCache
from engine.ports import NoiseCache, Offer, StateKind, StoredState, Wish
from engine.types import CacheScope
from tests.noise import SHAPE, key, offer, prompt
from tests.redis_server import RedisServer

LIMIT_BYTES = 256 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


def shared(server: RedisServer, policy: str = "lcbfu") -> RedisNoiseCache:
    cache = RedisNoiseCache(
        RedisSettings(url=server.url, timeout_s=10.0),
        limit_bytes=LIMIT_BYTES,
        policy=policy_named(policy),
    )
    cache.sync()
    return cache


@pytest.mark.parametrize("policy", ["lcbfu", "gdsf"])
def test_the_limit_holds_among_concurrent_writers(server: RedisServer, policy: str) -> None:
    """Six writers and readers of two namespaces; the counter is watched throughout, and Redis' own
    account of the memory is taken at the end.
    """
    spaces = [namespace_of(key(tenant)) for tenant in ("ada", "bob")]
    done = threading.Event()
    seen: list[int] = []
    problems: list[BaseException] = []
    with redis.Redis.from_url(server.url) as client:
        client.flushall()

        def write(writer: int) -> None:
            try:
                cache = shared(server, policy)
                random = np.random.default_rng(writer)
                for i in range(60):
                    tenant = ("ada", "bob")[int(random.integers(2))]
                    states = int(random.integers(1, 6))
                    kind = (StateKind.CLEAN, StateKind.NOISY)[int(random.integers(2))]
                    made = offer(
                        1000 * writer + i,
                        kind=kind,
                        levels=tuple(float(n) for n in range(states)),
                        saved=tuple(range(1, states + 1)),
                        claim=f"{writer} {i}",
                    )
                    assert cache.offer(key(tenant), made)
                    asked = f"e{1000 * writer + int(random.integers(i + 1))}.0"
                    cache.fetch(key(tenant), [Wish(asked, 3)], claim=f"reader {i}")
                cache.close()
            except BaseException as error:
                problems.append(error)

        def watch() -> None:
            with redis.Redis.from_url(server.url) as watching:
                while not done.is_set():
                    seen.extend(int(watching.get(s.size) or 0) for s in spaces)

        watcher = threading.Thread(target=watch)
        writers = [threading.Thread(target=write, args=(n,)) for n in range(6)]
        for thread in (watcher, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        watcher.join()

        assert problems == []
        assert max(seen) <= LIMIT_BYTES
        for space in spaces:
            charged = _charged(client, space.states)
            counted = int(client.get(space.size))
            assert charged == counted
            assert counted > LIMIT_BYTES // 2
            used = sum(int(client.memory_usage(name, samples=0) or 0) for name in space.keys)
            assert used <= LIMIT_BYTES
            assert client.zcard(space.scores) == sum(
                name.startswith(b"s:") for name in cast(list[bytes], client.hkeys(space.states))
            )


def _charged(client: redis.Redis, states: str) -> int:
    """Charges as they stand beside every state and entry."""
    fields = cast(dict[bytes, bytes], client.hgetall(states)).items()
    return sum(int(value.split(b"|")[0]) for name, value in fields if name[:2] in (b"m:", b"e:"))


def test_indexes_of_all_workers_agree_with_the_server_afterwards(server: RedisServer) -> None:
    """Also of one that comes late, and of one whose log was trimmed behind it."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        early, writer = shared(server), shared(server)
        early.nearest(key(), prompt(0), claim="", limit=1)
        early.sync()
        for number in range(200):
            assert writer.offer(key(), offer(number))
        late = shared(server)
        for cache in (early, late, writer):
            cache.nearest(key(), prompt(0), claim="", limit=1)
            cache.sync()
        held = {
            name[2:].decode()
            for name in cast(list[bytes], client.hkeys(namespace_of(key()).states))
            if name.startswith(b"s:")
        }
        for cache in (early, late, writer):
            found = cache.nearest(key(), prompt(0), claim="", limit=1000)
            assert {ref.id for candidate in found for ref in candidate.states} == held
            cache.close()
        assert early.statistics().resyncs == 1  # 200 offers are more than its log holds
        assert late.statistics().resyncs == 0


TENANTS = ("ada", "bob", None)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(["offer", "fetch", "nearest", "clear"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


@pytest.mark.parametrize("backend", ["memory", "redis"])
@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, policy=st.sampled_from(sorted(POLICIES)))
def test_tenants_never_share_a_state(
    server: RedisServer,
    backend: str,
    operations: list[tuple[str | None, str, int]],
    policy: str,
) -> None:
    """All of them offer the same prompts under the same ids; the latents say whose they are."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    cache: NoiseCache
    if backend == "redis":
        cache = shared(server, policy)
    else:
        cache = MemoryNoiseCache(limit_bytes=16 * 1024, policy=policy_named(policy))
    held: dict[str | None, set[str]] = {tenant: set() for tenant in TENANTS}
    for tenant, operation, number in operations:
        mark = float(TENANTS.index(tenant) + 1)
        if operation == "offer":
            state = StoredState(
                f"e{number}.0", StateKind.CLEAN, -1.0, np.full(SHAPE, mark, np.float32)
            )
            if cache.offer(key(tenant), Offer(f"e{number}", prompt(number), "", ((state, 2),))):
                held[tenant].add(state.id)
        elif operation == "fetch":
            found = cache.fetch(key(tenant), [Wish(f"e{number}.0", 2)])
            if found is not None:
                assert found.latent.max() == found.latent.min() == mark
                assert found.id in held[tenant]
        elif operation == "nearest":
            if isinstance(cache, RedisNoiseCache):
                cache.sync()
            found_here = cache.nearest(key(tenant), prompt(number), claim="", limit=8)
            assert {candidate.states[0].id for candidate in found_here} <= held[tenant]
        elif cache.clear(CacheScope(tenant=tenant, shared=tenant is None)):
            held[tenant].clear()
    cache.close()
