"""The noise cache in this process's memory: the default where no Redis is configured."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cache.accounting import MAX_CLAIMS, Counters, entry_bytes, state_bytes
from cache.codec import CodecError, decode, encode
from cache.embedding import NAME as EMBEDDING_NAME
from cache.embedding import embed
from cache.index import EntryIndex, entry_of
from cache.keys import Namespace, compatibility, namespace_of
from cache.policy import DEFAULT_POLICY, EvictionPolicy, Facts, policy_named
from engine.errors import InvalidRequestError
from engine.ports import (
    CacheKey,
    CacheStatistics,
    Candidate,
    Embedding,
    Offer,
    StateKind,
    StateRef,
    StoredState,
    Wish,
)
from engine.types import CachedState, CacheScope, CacheShare

DEFAULT_LIMIT_BYTES = 256 * 2**20
MAX_NAMESPACES = 1024


@dataclass(slots=True)
class _Held:
    ref: StateRef
    payload: bytes
    size_bytes: int
    score: float
    uses: int = 0


@dataclass(slots=True)
class _Space:
    """One namespace. ``queue`` holds (score, id) with stale pairs left in until they surface."""

    index: EntryIndex = field(default_factory=EntryIndex)
    held: dict[str, _Held] = field(default_factory=dict)
    claims: dict[str, list[str]] = field(default_factory=dict)
    entry_bytes: dict[str, int] = field(default_factory=dict)
    entry_states: dict[str, int] = field(default_factory=dict)
    queue: list[tuple[float, str]] = field(default_factory=list)
    size_bytes: int = 0
    floor: float = 0.0
    used_at_s: float = 0.0


class MemoryNoiseCache:
    """A :class:`~engine.ports.NoiseCache` in memory. Safe from any thread.

    Args:
        limit_bytes: of each namespace, never exceeded.
        now_s: Unix time.
    """

    def __init__(
        self,
        *,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        policy: EvictionPolicy | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if limit_bytes < 1:
            raise InvalidRequestError(f"limit_bytes is {limit_bytes}; allowed: 1 or more")
        self._limit_bytes = limit_bytes
        self._policy = policy or policy_named(DEFAULT_POLICY)
        self._now_s = now_s
        self._spaces: dict[Namespace, _Space] = {}
        self._counters = Counters()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Nothing goes on in the background."""

    def embed(self, context: npt.NDArray[np.float32]) -> Embedding:
        """See :func:`cache.embedding.embed`."""
        return embed(context)

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        """The closest entries of ``key``, best first."""
        with self._lock:
            space = self._spaces.get(namespace_of(key))
        if space is None:
            return []
        group = compatibility(key, EMBEDDING_NAME)
        return space.index.nearest(group, embedding, claim=claim, limit=limit)

    def fetch(
        self, key: CacheKey, wishes: Sequence[Wish], *, claim: str = ""
    ) -> StoredState | None:
        """The first of ``wishes`` that is there and free for ``claim``."""
        with self._lock:
            found = self._take(namespace_of(key), wishes, claim)
        self._counters.add("misses" if found is None else "hits")
        return found

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        """Store a picture's states, evicting the lowest scores where there is no room."""
        payloads = [(state, saved, encode(state)) for state, saved in offer.states]
        exclusive = any(state.kind is StateKind.NOISY for state, _ in offer.states)
        charge = entry_bytes(offer.embedding, exclusive=exclusive)
        needed = charge + sum(state_bytes(payload) for _, _, payload in payloads)
        with self._lock:
            space = self._open(namespace_of(key))
            if not payloads or needed > self._limit_bytes or offer.entry in space.entry_bytes:
                self._counters.add("refused")
                return False
            while space.size_bytes + needed > self._limit_bytes:
                self._evict_lowest(space)
            now_s = self._now_s()
            for state, saved, payload in payloads:
                size = state_bytes(payload)
                facts = Facts(
                    uses=0, steps_saved=saved, size_bytes=size, now_s=now_s, floor=space.floor
                )
                score = self._policy.stored(facts)
                ref = StateRef(state.id, state.kind, state.log_snr)
                space.held[state.id] = _Held(ref, payload, size, score)
                heapq.heappush(space.queue, (score, state.id))
            space.size_bytes += needed
            space.entry_bytes[offer.entry] = charge
            space.entry_states[offer.entry] = len(payloads)
            claims = [offer.claim] if exclusive else []
            space.claims[offer.entry] = claims
            space.index.add(
                offer.entry,
                None if offer.embedding is None else compatibility(key, EMBEDDING_NAME),
                offer.embedding,
                [space.held[state.id].ref for state, _ in offer.states],
                claims,
            )
        self._counters.add("stored", len(payloads))
        return True

    def statistics(self) -> CacheStatistics:
        """Contents and counters."""
        with self._lock:
            spaces = list(self._spaces.values())
            return self._counters.statistics(
                backend="memory",
                namespaces=len(spaces),
                entries=sum(len(space.entry_bytes) for space in spaces),
                states=sum(len(space.held) for space in spaces),
                size_bytes=sum(space.size_bytes for space in spaces),
                limit_bytes=self._limit_bytes,
                policy=self._policy.name,
            )

    def shares(self, scope: CacheScope, *, best: int = 0) -> Sequence[CacheShare]:
        """What is held within ``scope``, the largest share first."""
        with self._lock:
            found = [
                _share(name, space, best)
                for name, space in self._spaces.items()
                if space.held and scope.covers(name.tenant, name.checkpoint)
            ]
        return sorted(found, key=lambda share: -share.size_bytes)

    def clear(self, scope: CacheScope) -> Sequence[CacheShare]:
        """Forget what is held within ``scope``."""
        with self._lock:
            meant = [n for n in self._spaces if scope.covers(n.tenant, n.checkpoint)]
            gone = [_share(name, self._spaces.pop(name), 0) for name in meant]
        return [share for share in gone if share.states]

    def close(self) -> None:
        """Nothing to let go of."""

    # ------------------------------------------------------------------ under the lock

    def _open(self, namespace: Namespace) -> _Space:
        space = self._spaces.get(namespace)
        if space is None:
            if len(self._spaces) >= MAX_NAMESPACES:  # the tenant who has been away longest
                del self._spaces[min(self._spaces, key=lambda n: self._spaces[n].used_at_s)]
            space = self._spaces[namespace] = _Space()
        space.used_at_s = self._now_s()
        return space

    def _take(self, namespace: Namespace, wishes: Sequence[Wish], claim: str) -> StoredState | None:
        space = self._spaces.get(namespace)
        for wish in wishes if space is not None else ():
            assert space is not None
            held = space.held.get(wish.state)
            if held is None:
                continue
            try:
                state = decode(wish.state, held.payload)
            except CodecError:
                self._counters.add("corrupt")
                self._remove(space, wish.state)
                continue
            if state.kind is StateKind.NOISY and not self._claim(space, wish.state, claim):
                continue
            self._use(space, wish, held)
            return state
        return None

    def _claim(self, space: _Space, state: str, claim: str) -> bool:
        entry = entry_of(state)
        claims = space.claims[entry]
        if claim in claims or len(claims) >= MAX_CLAIMS:
            return False
        claims.append(claim)
        space.index.claim(entry, claim)
        return True

    def _use(self, space: _Space, wish: Wish, held: _Held) -> None:
        held.uses += 1
        now_s = space.used_at_s = self._now_s()
        facts = Facts(
            uses=held.uses,
            steps_saved=wish.steps_saved,
            size_bytes=held.size_bytes,
            now_s=now_s,
            floor=space.floor,
        )
        held.score = self._policy.used(held.score, facts)
        heapq.heappush(space.queue, (held.score, wish.state))
        if len(space.queue) > 4 * len(space.held) + 64:
            space.queue = [(held.score, name) for name, held in space.held.items()]
            heapq.heapify(space.queue)

    def _evict_lowest(self, space: _Space) -> None:
        while True:
            score, state = heapq.heappop(space.queue)
            held = space.held.get(state)
            if held is not None and held.score == score:
                break
        space.floor = max(space.floor, score)
        self._remove(space, state)
        self._counters.add("evicted")

    def _remove(self, space: _Space, state: str) -> None:
        entry = entry_of(state)
        space.size_bytes -= space.held.pop(state).size_bytes
        space.index.drop_state(state)
        space.entry_states[entry] -= 1
        if not space.entry_states[entry]:
            space.size_bytes -= space.entry_bytes.pop(entry)
            del space.entry_states[entry], space.claims[entry]


def _share(name: Namespace, space: _Space, best: int) -> CacheShare:
    highest = heapq.nlargest(best, space.held.values(), key=lambda held: held.score)
    return CacheShare(
        tenant=name.tenant,
        checkpoint=name.checkpoint,
        entries=len(space.entry_bytes),
        states=len(space.held),
        size_bytes=space.size_bytes,
        best=tuple(
            CachedState(
                id=held.ref.id,
                kind=held.ref.kind.value,
                log_snr=held.ref.log_snr,
                uses=held.uses,
                size_bytes=held.size_bytes,
                score=held.score,
            )
            for held in highest
        ),
    )
