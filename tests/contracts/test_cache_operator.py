"""What operators do on a real Redis leaves no key for ever, and foreign values stop nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from cache.connection import RedisSettings
from cache.inspection import Operator
from cache.keys import REGISTRY, Namespace, namespace_of
from cache.redis import RedisNoiseCache
from engine.types import CacheScope, CacheShare
from tests.noise import key, offer
from tests.redis_server import RedisServer

EVERYTHING = CacheScope()
ADA, BOB = namespace_of(key("ada")), namespace_of(key("bob"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """Of a server that holds two states of ada's and of bob's each."""
    with redis.Redis.from_url(server.url) as opened:
        opened.flushall()
        cache = RedisNoiseCache(RedisSettings(url=server.url, timeout_s=5.0))
        cache.sync()
        for tenant, number in (("ada", 1), ("bob", 2)):
            assert cache.offer(key(tenant), offer(number))
        cache.sync()
        cache.close()
        yield opened


def states_by_tenant(shares: list[CacheShare]) -> dict[str | None, int]:
    return {share.tenant: share.states for share in shares}


def without_end(client: redis.Redis) -> list[bytes]:
    """Keys that never expire, but for the registry, which is bounded."""
    return [
        name for name in client.scan_iter() if client.ttl(name) == -1 and name != REGISTRY.encode()
    ]


# ---------------------------------------------------------------------- clearing


def test_clearing_what_has_expired_makes_no_key(client: redis.Redis) -> None:
    client.delete(*ADA.keys, *BOB.keys)  # as if the time of all of them had passed
    assert client.zcard(REGISTRY) == 2
    assert Operator(client).clear(EVERYTHING) == []
    assert client.keys() == [REGISTRY.encode()]


@pytest.mark.parametrize("lost", ["log", "end"])
def test_a_log_made_anew_by_clearing_has_an_end(client: redis.Redis, lost: str) -> None:
    """Its log alone can be gone (evicted by the server), or be one that never got an end."""
    if lost == "log":
        client.delete(ADA.log)
    else:
        client.persist(ADA.log)
    assert states_by_tenant(Operator(client).clear(EVERYTHING)) == {"ada": 2, "bob": 2}
    assert client.exists(ADA.log) == 1
    assert without_end(client) == []


def test_clearing_again_keeps_the_logs_end(client: redis.Redis) -> None:
    client.expire(ADA.log, 77_000)
    Operator(client).clear(EVERYTHING)
    Operator(client).clear(EVERYTHING)
    assert 76_000 < client.ttl(ADA.log) <= 77_000


# ---------------------------------------------------------------------- foreign values


@pytest.mark.parametrize(
    "member",
    [
        b"\xff\xfe",
        b"not JSON",
        b"5",
        b'["ada"]',
        b'["ada", "weights", "more"]',
        b'{"ada": 1, "weights": 2}',
        b"[1, 2]",
        b'["ada", null]',
        b'["ada","weights"]',  # ada's, but in other words: it may not count twice
        b'["\\ud800", "weights"]',
        b"[" * 100_000,
    ],
)
def test_a_foreign_member_of_the_registry_is_left_out(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, member: bytes
) -> None:
    client.zadd(REGISTRY, {member: 1.0})
    operator = Operator(client)
    assert states_by_tenant(operator.shares(EVERYTHING, best=5)) == {"ada": 2, "bob": 2}
    [told] = caplog.messages
    assert "leaves out 1 members of the registry" in told
    assert states_by_tenant(operator.clear(EVERYTHING)) == {"ada": 2, "bob": 2}


def corrupt_size(client: redis.Redis) -> None:
    client.set(ADA.size, "many")


def foreign_size(client: redis.Redis) -> None:
    foreign(client, ADA.size)


def foreign_scores(client: redis.Redis) -> None:
    foreign(client, ADA.scores)


def foreign_states(client: redis.Redis) -> None:
    foreign(client, ADA.states)


def foreign(client: redis.Redis, name: str) -> None:
    client.delete(name)
    client.rpush(name, "a list")


@pytest.mark.parametrize("spoil", [corrupt_size, foreign_size, foreign_scores, foreign_states])
def test_a_namespace_that_is_spoilt_hides_no_other_and_clearing_mends_it(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, spoil: Callable[[redis.Redis], None]
) -> None:
    spoil(client)
    operator = Operator(client)
    assert states_by_tenant(operator.shares(EVERYTHING, best=5)) == {"bob": 2}
    assert "leaves out 1 namespaces" in caplog.text
    assert "bob" in states_by_tenant(operator.clear(EVERYTHING))
    assert client.exists(ADA.states, ADA.scores, ADA.size) == 0
    assert without_end(client) == []


def test_a_foreign_log_does_not_stop_clearing(client: redis.Redis) -> None:
    foreign(client, ADA.log)
    assert states_by_tenant(Operator(client).clear(EVERYTHING)) == {"ada": 2, "bob": 2}
    assert client.type(ADA.log) == b"stream"
    assert without_end(client) == []


@pytest.mark.parametrize(
    ("name", "meta", "score"),
    [
        (b"e9.0", b"1|2|clean", 1.0),
        (b"e9.0", b"much|2|clean|0.0", 1.0),
        (b"e9.0", b"\xff|2|clean|0.0", 1.0),
        (b"\xff.0", b"1|2|clean|0.0", 1.0),
        (b"e9.0", b"1|2|clean|0.0", float("inf")),
    ],
)
def test_a_state_that_cannot_be_read_is_left_out_of_the_best(
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    name: bytes,
    meta: bytes,
    score: float,
) -> None:
    client.zadd(ADA.scores, {name: score})
    client.hset(ADA.states, b"m:" + name, meta)
    shares = {share.tenant: share for share in Operator(client).shares(EVERYTHING, best=9)}
    assert {state.id for state in shares["ada"].best} == {"e1.0", "e1.1"}
    assert "leaves out 1 states" in caplog.text


def test_a_states_name_without_an_entry_stops_no_clearing(client: redis.Redis) -> None:
    client.zadd(ADA.scores, {"nothing of ours": 1.0})
    assert states_by_tenant(Operator(client).clear(EVERYTHING)) == {"ada": 3, "bob": 2}


def test_names_of_namespaces_are_read_as_they_are_written() -> None:
    for namespace in (ADA, Namespace(None, "weights"), Namespace("é\n", "w")):
        assert Namespace.named(namespace.name) == namespace
