"""One contract for every noise cache: in memory, and on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import redis

from cache.accounting import MAX_CLAIMS
from cache.connection import RedisSettings
from cache.memory import MemoryNoiseCache
from cache.policy import POLICIES, EvictionPolicy, policy_named
from cache.redis import RedisNoiseCache
from engine.errors import BackendUnavailableError
from engine.ports import CacheKey, NoiseCache, StateKind, Wish
from engine.types import CacheScope, CacheShare
from tests.noise import charged_bytes, key, latent, offer, prompt
from tests.redis_server import RedisServer

ROOMY_BYTES = 2**20
STATE_BYTES = 384 + 36 + 4 * 6 * 5 * 2
ENTRY_BYTES = 256 + 2 * 512


class Store:
    """Makes caches of one kind on a clock that the test moves, and lets them catch up."""

    def __init__(self, redis_url: str | None) -> None:
        self.now_s = 1_000_000.0
        self._url = redis_url
        self._open: list[NoiseCache] = []

    def open(
        self, limit_bytes: int = ROOMY_BYTES, policy: EvictionPolicy | None = None
    ) -> NoiseCache:
        cache: NoiseCache
        if self._url is None:
            cache = MemoryNoiseCache(
                limit_bytes=limit_bytes, policy=policy, now_s=lambda: self.now_s
            )
        else:
            # The log has its own share of the limit: give the states what the test asks for.
            log_bytes = 16 * 256 if limit_bytes < ROOMY_BYTES else 0
            cache = RedisNoiseCache(
                RedisSettings(url=self._url, timeout_s=5.0),
                limit_bytes=limit_bytes + log_bytes,
                policy=policy,
                now_s=lambda: self.now_s,
            )
            cache.sync()
        self._open.append(cache)
        return cache

    def settle(self, cache: NoiseCache) -> None:
        if isinstance(cache, RedisNoiseCache):
            cache.sync()

    def close(self) -> None:
        for cache in self._open:
            cache.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    url = None
    if request.param == "redis":
        redis_server: RedisServer = request.getfixturevalue("server")
        flush(redis_server)
        url = redis_server.url
    made = Store(url)
    yield made
    made.close()


def flush(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


def nearest(cache: NoiseCache, key_: CacheKey, number: int, claim: str = "") -> list[str]:
    found = cache.nearest(key_, prompt(number), claim=claim, limit=8)
    return [candidate.entry for candidate in found]


def present(cache: NoiseCache, state: str) -> bool:
    return cache.fetch(key(), [Wish(state, 1)], claim="anyone") is not None


def put(store: Store, cache: NoiseCache, *numbers: int, **about: object) -> None:
    for number in numbers:
        assert cache.offer(key(), offer(number, **about))  # type: ignore[arg-type]
    store.settle(cache)


# ---------------------------------------------------------------------- finding


def test_what_was_offered_is_found_by_similarity_and_fetched_as_it_was(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1, 2, 3)
    asked = prompt(50, towards=2, cosine=0.9)
    best, *others = cache.nearest(key(), asked, claim="", limit=8)
    assert best.entry == "e2"
    assert best.similarity == pytest.approx(0.9, abs=2e-3)
    assert [other.similarity < 0.5 for other in others] == [True, True]
    assert [(ref.kind, ref.log_snr) for ref in best.states] == [
        (StateKind.CLEAN, -2.0),
        (StateKind.CLEAN, -1.0),
    ]
    state = cache.fetch(key(), [Wish("e2.1", 4)])
    assert state is not None
    assert (state.id, state.kind, state.log_snr) == ("e2.1", StateKind.CLEAN, -1.0)
    assert np.array_equal(state.latent, latent(201))


def test_a_repeat_of_a_prompt_has_similarity_one(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1)
    (found,) = cache.nearest(key(), prompt(1), claim="", limit=1)
    assert found.similarity == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "bob"},
        {"tenant": None},
        {"checkpoint": "other weights"},
        {"noise_schedule": "other betas"},
        {"latent_shape": (4, 5, 6)},
        {"negative_prompt": "blurry"},
        {"guidance": "7:0.0-1.0"},
        {"conditions": "an adapter at 0.5"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_requests_of_different_keys_never_meet(store: Store, other: dict[str, object]) -> None:
    cache = store.open()
    put(store, cache, 1)
    assert nearest(cache, key(**other), 1) == []  # type: ignore[arg-type]
    cache.offer(key(**other), offer(2))  # type: ignore[arg-type]
    store.settle(cache)
    assert nearest(cache, key(), 2) == ["e1"]


def test_another_tenant_cannot_fetch_a_state_even_by_its_id(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1)
    assert cache.fetch(key("bob"), [Wish("e1.0", 2)]) is None


def test_the_first_wish_that_is_there_is_granted(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1)
    state = cache.fetch(key(), [Wish("e9.0", 9), Wish("e1.1", 4), Wish("e1.0", 2)])
    assert state is not None
    assert state.id == "e1.1"
    assert cache.fetch(key(), [Wish("e9.0", 9)]) is None
    assert cache.fetch(key(), []) is None
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses) == (1, 2)


def test_a_noisy_state_serves_each_claim_once_and_never_its_own_prompt(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1, kind=StateKind.NOISY, claim="ada: a cat")
    assert nearest(cache, key(), 1, claim="ada: a cat") == []
    assert cache.fetch(key(), [Wish("e1.0", 2)], claim="ada: a cat") is None
    assert nearest(cache, key(), 1, claim="ada: a dog") == ["e1"]
    assert cache.fetch(key(), [Wish("e1.0", 2)], claim="ada: a dog") is not None
    assert cache.fetch(key(), [Wish("e1.1", 4)], claim="ada: a dog") is None
    store.settle(cache)
    assert nearest(cache, key(), 1, claim="ada: a dog") == []


def test_claims_on_an_entry_are_bounded(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1, kind=StateKind.NOISY, claim="0")
    granted = [
        cache.fetch(key(), [Wish("e1.0", 2)], claim=f"{i}") is not None
        for i in range(1, MAX_CLAIMS + 5)
    ]
    assert granted == [True] * (MAX_CLAIMS - 1) + [False] * 5


def test_a_final_latent_is_kept_to_the_bit_and_found_by_id_only(store: Store) -> None:
    cache = store.open()
    exact = offer(1, kind=StateKind.FINAL, levels=(float("inf"),), saved=(20,))
    precise = exact.states[0][0].latent * np.float32(1 / 3)
    state = type(exact.states[0][0])("e1.0", StateKind.FINAL, float("inf"), precise)
    assert cache.offer(key(), type(exact)("e1", None, "", ((state, 20),)))
    store.settle(cache)
    assert nearest(cache, key(), 1) == []
    found = cache.fetch(key(), [Wish("e1.0", 20)])
    assert found is not None
    assert np.array_equal(found.latent, precise)


# ---------------------------------------------------------------------- the limit


def test_the_limit_is_kept_and_states_go_one_by_one(store: Store) -> None:
    cache = store.open(2 * ENTRY_BYTES + 3 * STATE_BYTES, policy_named("fifo"))
    put(store, cache, 1)
    store.now_s += 1
    put(store, cache, 2, levels=(-2.0,), saved=(2,))
    store.now_s += 1
    put(store, cache, 3, levels=(-2.0,), saved=(2,))  # room for it: both states of e1
    assert nearest(cache, key(), 1) == ["e2", "e3"] or nearest(cache, key(), 1) == ["e3", "e2"]
    assert cache.statistics().evicted == 2
    statistics = cache.statistics()
    assert (statistics.entries, statistics.states) == (2, 2)


def test_where_the_later_state_is_gone_the_earlier_one_is_still_listed(store: Store) -> None:
    """NIRVANA evicts single states: the largest smaller jump of the same prompt serves."""
    cache = store.open(2 * ENTRY_BYTES + 3 * STATE_BYTES, policy_named("lcbfu"))
    put(store, cache, 1, saved=(8, 2))  # the second saves the least: it goes first
    put(store, cache, 2, saved=(8, 8))
    (entry,) = [c for c in cache.nearest(key(), prompt(1), claim="", limit=8) if c.entry == "e1"]
    assert [ref.id for ref in entry.states] == ["e1.0"]


def test_what_is_larger_than_the_limit_or_offered_twice_is_refused(store: Store) -> None:
    cache = store.open(ENTRY_BYTES + 2 * STATE_BYTES)
    assert not cache.offer(key(), offer(1, levels=(1.0, 2.0, 3.0), saved=(1, 1, 1)))
    put(store, cache, 2)
    assert not cache.offer(key(), offer(2))
    assert present(cache, "e2.0")
    assert cache.statistics().stored == 2


# ---------------------------------------------------------------------- eviction


def survivors(store: Store, policy: EvictionPolicy, uses: dict[int, list[int]]) -> set[int]:
    """Store e1 to e3 a second apart, use them as told, offer e4: which are left?"""
    cache = store.open(3 * (ENTRY_BYTES + STATE_BYTES), policy)
    for number in (1, 2, 3):
        put(store, cache, number, levels=(-1.0,), saved=(4,))
        store.now_s += 1
    for number, saved in uses.items():
        for steps in saved:
            assert cache.fetch(key(), [Wish(f"e{number}.0", steps)]) is not None
            store.now_s += 1
    put(store, cache, 4, levels=(-1.0,), saved=(4,))
    found = cache.nearest(key(), prompt(1), claim="", limit=8)
    return {int(candidate.entry[1:]) for candidate in found}


@pytest.mark.parametrize(
    ("policy", "uses", "gone"),
    [
        ("fifo", {1: [9, 9]}, 1),
        ("lru", {1: [1], 2: [1]}, 3),
        ("lfu", {1: [1, 1], 2: [9], 3: [1, 1]}, 2),
        ("lcbfu-published", {1: [1, 1, 1], 2: [2], 3: [9]}, 2),
        ("lcbfu", {1: [1, 1, 1], 2: [1], 3: [9]}, 2),
        ("gdsf", {1: [1, 1, 1], 2: [1], 3: [9]}, 2),
    ],
)
def test_each_policy_evicts_what_it_says(
    store: Store, policy: str, uses: dict[int, list[int]], gone: int
) -> None:
    assert survivors(store, policy_named(policy), uses) == {1, 2, 3, 4} - {gone}


def test_a_new_state_is_not_the_first_to_go(store: Store) -> None:
    """The published policy starts at zero uses and evicts what it has just stored."""
    cache = store.open(2 * (ENTRY_BYTES + STATE_BYTES), policy_named("lcbfu", half_life_s=60.0))
    put(store, cache, 1, levels=(-1.0,), saved=(4,))
    cache.fetch(key(), [Wish("e1.0", 4)])
    store.now_s += 600
    put(store, cache, 2, levels=(-1.0,), saved=(4,))
    put(store, cache, 3, levels=(-1.0,), saved=(4,))
    assert not present(cache, "e1.0")
    assert present(cache, "e2.0")
    assert present(cache, "e3.0")


def test_benefit_decays(store: Store) -> None:
    """Ten uses long ago are worth less than two of today."""
    policy = policy_named("lcbfu", half_life_s=60.0)
    cache = store.open(2 * (ENTRY_BYTES + STATE_BYTES), policy)
    put(store, cache, 1, 2, levels=(-1.0,), saved=(4,))
    for _ in range(10):
        cache.fetch(key(), [Wish("e1.0", 4)])
    store.now_s += 300
    for _ in range(2):
        cache.fetch(key(), [Wish("e2.0", 4)])
    put(store, cache, 3, levels=(-1.0,), saved=(4,))
    assert not present(cache, "e1.0")
    assert present(cache, "e2.0")


@pytest.mark.parametrize("name", POLICIES)
def test_both_stores_evict_the_same(name: str, server: RedisServer) -> None:
    """A random history under every policy: the scores of Lua are those of Python."""
    kept = []
    for url in (None, server.url):
        flush(server)
        store = Store(url)
        random = np.random.default_rng(7)
        cache = store.open(6 * (ENTRY_BYTES + 2 * STATE_BYTES), policy_named(name))
        for number in range(40):
            put(store, cache, number, saved=tuple(int(s) for s in random.integers(1, 20, 2)))
            for _ in range(3):
                store.now_s += float(random.exponential(900))
                asked = f"e{random.integers(0, number + 1)}.{random.integers(0, 2)}"
                cache.fetch(key(), [Wish(asked, int(random.integers(1, 20)))])
        kept.append({f"e{n}.{i}" for n in range(40) for i in (0, 1) if present(cache, f"e{n}.{i}")})
        store.close()
    assert kept[0] == kept[1]
    assert len(kept[0]) >= 6


# ---------------------------------------------------------------------- operators


def states_by_share(shares: Sequence[CacheShare]) -> dict[tuple[str | None, str], int]:
    return {(share.tenant, share.checkpoint): share.states for share in shares}


@pytest.fixture
def filled(store: Store) -> NoiseCache:
    """Three owners' states: two of one checkpoint, and ada's of another, where she has most."""
    cache = store.open()
    for tenant in ("ada", "bob", None):
        cache.offer(key(tenant), offer(1))
    for number in (2, 3):
        cache.offer(key("ada", checkpoint="other"), offer(number, levels=(-1.0,), saved=(4,)))
    store.settle(cache)
    return cache


def test_operators_see_what_each_tenant_holds_of_each_checkpoint(filled: NoiseCache) -> None:
    shares = filled.shares(CacheScope())
    assert states_by_share(shares) == {
        ("ada", "weights"): 2,
        ("bob", "weights"): 2,
        (None, "weights"): 2,
        ("ada", "other"): 2,
    }
    entries = {(s.tenant, s.checkpoint): (s.entries, s.size_bytes) for s in shares}
    single = charged_bytes(offer(2, levels=(-1.0,), saved=(4,)))
    assert entries["ada", "other"] == (2, 2 * single)
    assert entries["bob", "weights"] == (1, charged_bytes(offer(1)))
    assert shares[0].checkpoint == "other"  # the largest first
    total = filled.statistics()
    assert sum(share.states for share in shares) == total.states
    assert sum(share.entries for share in shares) == total.entries
    assert sum(share.size_bytes for share in shares) == total.size_bytes


def test_the_best_states_are_those_that_would_go_last(store: Store) -> None:
    cache = store.open()
    put(store, cache, 1, 2)
    for _ in range(3):
        cache.fetch(key(), [Wish("e2.0", 9)])
    (share,) = cache.shares(CacheScope(), best=2)
    first, second = share.best
    assert (first.id, first.kind, first.log_snr, first.uses) == ("e2.0", "clean", -2.0, 3)
    assert 2 * first.size_bytes == charged_bytes(offer(2)) - ENTRY_BYTES
    assert first.score > second.score
    (share,) = cache.shares(CacheScope(), best=0)
    assert share.best == ()


@pytest.mark.parametrize(
    ("scope", "gone"),
    [
        (CacheScope(tenant="ada"), {("ada", "weights"), ("ada", "other")}),
        (CacheScope(tenant="ada", checkpoint="other"), {("ada", "other")}),
        (
            CacheScope(checkpoint="weights"),
            {("ada", "weights"), ("bob", "weights"), (None, "weights")},
        ),
        (CacheScope(shared=True), {(None, "weights")}),
        (CacheScope(shared=True, checkpoint="other"), set()),
        (CacheScope(tenant="nobody"), set()),
        (
            CacheScope(),
            {("ada", "weights"), ("bob", "weights"), (None, "weights"), ("ada", "other")},
        ),
    ],
)
def test_clearing_forgets_what_was_meant_and_says_what_that_was(
    store: Store, filled: NoiseCache, scope: CacheScope, gone: set[tuple[str | None, str]]
) -> None:
    before = filled.shares(CacheScope())
    meant = {name: states for name, states in states_by_share(before).items() if name in gone}
    assert states_by_share(filled.shares(scope)) == meant
    cleared = filled.clear(scope)
    assert states_by_share(cleared) == meant
    sizes = {(s.tenant, s.checkpoint): (s.entries, s.size_bytes) for s in before}
    assert all(sizes[s.tenant, s.checkpoint] == (s.entries, s.size_bytes) for s in cleared)
    store.settle(filled)
    left = {name: n for name, n in states_by_share(before).items() if name not in gone}
    assert states_by_share(filled.shares(CacheScope())) == left
    assert filled.statistics().states == sum(left.values())
    for tenant in ("ada", "bob", None):
        expected = [] if (tenant, "weights") in gone else ["e1"]
        assert nearest(filled, key(tenant), 1) == expected
    assert filled.clear(scope) == []


def test_what_was_cleared_is_stored_again(store: Store, filled: NoiseCache) -> None:
    filled.clear(CacheScope())
    store.settle(filled)
    put(store, filled, 1)
    assert nearest(filled, key(), 1) == ["e1"]
    assert states_by_share(filled.shares(CacheScope())) == {("ada", "weights"): 2}


# ---------------------------------------------------------------------- of Redis alone


def test_operators_are_told_when_redis_cannot_be_asked(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with RedisServer(tmp_path_factory.mktemp("lost")) as server:
        cache = RedisNoiseCache(RedisSettings(url=server.url))
        cache.sync()
        server.kill()
        for ask in (cache.shares, cache.clear):
            with pytest.raises(BackendUnavailableError, match="cannot be asked"):
                ask(CacheScope())
        cache.close()


@pytest.mark.parametrize("stored_before", [True, False])
def test_a_flushed_server_hides_nothing_from_operators(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, stored_before: bool
) -> None:
    monkeypatch.setattr("cache.redis.REGISTER_AGAIN_S", 60.0 if stored_before else 0.0)
    flush(server)
    store = Store(server.url)
    cache = store.open()
    nearest(cache, key(), 1)  # asked for: from now on this namespace is followed
    if stored_before:
        put(store, cache, 1)
    store.settle(cache)
    flush(server)
    put(store, cache, 2)
    assert states_by_share(cache.shares(CacheScope())) == {("ada", "weights"): 2}
    store.close()
