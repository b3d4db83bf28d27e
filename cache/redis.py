"""The noise cache on a Redis that all workers share (7.0 and newer, no modules).

A request pays one round trip for a hit (``fetch``) and none for a miss: the index of embeddings is
in this process and follows Redis' log on a thread of its own. That thread is also the only one that
probes a server which has failed: requests then skip the cache, counted, until it answers again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from cache import scripts
from cache.accounting import Counters, entry_bytes, state_bytes
from cache.codec import CodecError, decode, encode
from cache.connection import Backoff, IncompatibleServerError, RedisSettings, check_version
from cache.embedding import NAME as EMBEDDING_NAME
from cache.embedding import embed
from cache.inspection import Operator
from cache.keys import REGISTRY, Namespace, compatibility, namespace_of
from cache.memory import DEFAULT_LIMIT_BYTES
from cache.policy import DEFAULT_POLICY, EvictionPolicy, policy_named
from cache.replica import Replica, describe_state, encode_embedding
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
from engine.types import CacheScope, CacheShare

_log = logging.getLogger(__name__)

MAX_REPLICAS = 64
"""Namespaces whose index this process follows; the one not asked for longest is let go."""
MAX_REGISTERED = 10_000
REGISTER_AGAIN_S = 60.0
"""A server that was flushed or replaced must not hide from operators what it holds since."""
POLL_S = 0.1
DEFAULT_TTL_S = 7 * 24 * 3600
LOG_ENTRY_BYTES = 256
"""Charge of an entry of the log; it takes at most a sixteenth of the limit."""


class RedisNoiseCache:
    """A :class:`~engine.ports.NoiseCache` on Redis. Safe from any thread. Opens no connection
    before :meth:`start`, :meth:`sync` or its first use.

    Args:
        limit_bytes: of each namespace, its log included; never exceeded. All writers of a
            namespace should agree on it and on the policy.
        ttl_s: a namespace that nobody uses for so long is gone.
        now_s: Unix time for scores; by default the server's own, so that workers need not agree.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        policy: EvictionPolicy | None = None,
        ttl_s: int = DEFAULT_TTL_S,
        poll_s: float = POLL_S,
        now_s: Callable[[], float] | None = None,
    ) -> None:
        if limit_bytes < 1 or ttl_s < 1 or poll_s <= 0:
            raise InvalidRequestError("limit_bytes, ttl_s and poll_s must be above 0")
        self._limit_bytes = limit_bytes
        self._log_limit = max(16, min(8192, limit_bytes // 16 // LOG_ENTRY_BYTES))
        self._policy = policy or policy_named(DEFAULT_POLICY)
        self._ttl_s = ttl_s
        self._poll_s = poll_s
        self._now_s = now_s
        self._client = settings.client(settings.timeout_s)
        self._prober = settings.client(settings.probe_timeout_s)
        self._fetch = self._client.register_script(scripts.FETCH)
        self._offer = self._client.register_script(scripts.OFFER)
        self._drop = self._client.register_script(scripts.DROP)
        self._replicas: OrderedDict[Namespace, Replica] = OrderedDict()
        self._registered_at_s: dict[Namespace, float] = {}
        self._resyncs_before = self._unread_before = 0  # of replicas let go
        self._counters = Counters()
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._available = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ the protocol

    def embed(self, context: npt.NDArray[np.float32]) -> Embedding:
        """See :func:`cache.embedding.embed`."""
        return embed(context)

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        """The closest entries of ``key`` in this process's index, best first; asks nobody."""
        replica = self._replica(namespace_of(key))
        if not self._available:
            self._counters.add("skipped")
            return []
        group = compatibility(key, EMBEDDING_NAME)
        return replica.index.nearest(group, embedding, claim=claim, limit=limit)

    def fetch(
        self, key: CacheKey, wishes: Sequence[Wish], *, claim: str = ""
    ) -> StoredState | None:
        """The first of ``wishes`` that is there and free for ``claim``: one round trip."""
        namespace = namespace_of(key)
        pairs = [value for wish in wishes for value in (wish.state, wish.steps_saved)]
        answer = self._call(
            self._fetch, namespace, [*self._common(), self._log_limit, claim, *pairs]
        )
        state = None
        if answer is not None:
            state = self._decode(namespace, answer[0].decode(), answer[1])
        self._counters.add("misses" if state is None else "hits")
        return state

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        """Store a picture's states: one round trip, evicting the lowest scores in the same."""
        namespace = namespace_of(key)
        self._replica(namespace)
        exclusive = any(state.kind is StateKind.NOISY for state, _ in offer.states)
        record = b"%d|%s|%s" % (
            charge := entry_bytes(offer.embedding, exclusive=exclusive),
            compatibility(key, EMBEDDING_NAME).encode(),
            encode_embedding(offer.embedding),
        )
        arguments: list[Any] = [
            *self._common(),
            self._log_limit,
            self._limit_bytes - self._log_limit * LOG_ENTRY_BYTES,
            offer.entry,
            record,
            charge,
            offer.claim if exclusive else "",
        ]
        for state, saved in offer.states:
            payload = encode(state)
            described = describe_state(StateRef(state.id, state.kind, state.log_snr))
            arguments += [state.id, saved, state_bytes(payload), described, payload]
        answer = self._call(self._offer, namespace, arguments) if offer.states else None
        if answer is None:
            return False
        outcome, evicted = answer[0].decode(), int(answer[1])
        self._counters.add("evicted", evicted)
        self._counters.add("stored" if outcome == "stored" else "refused", len(offer.states))
        return bool(outcome == "stored")

    def statistics(self) -> CacheStatistics:
        """Counters, and what the followed namespaces held when they were last looked at."""
        with self._lock:
            replicas = list(self._replicas.values())
            resyncs = self._resyncs_before + sum(replica.resyncs for replica in replicas)
            unread = self._unread_before + sum(replica.corrupt for replica in replicas)
        counted = self._counters.statistics(backend="redis")
        return self._counters.statistics(
            backend="redis",
            available=self._available,
            namespaces=len(replicas),
            entries=sum(replica.index.entries for replica in replicas),
            states=sum(replica.index.states for replica in replicas),
            size_bytes=sum(replica.size_bytes for replica in replicas),
            limit_bytes=self._limit_bytes,
            policy=self._policy.name,
            resyncs=resyncs,
            corrupt=counted.corrupt + unread,
        )

    def shares(self, scope: CacheScope, *, best: int = 0) -> Sequence[CacheShare]:
        """What the server holds within ``scope``; see :meth:`cache.inspection.Operator.shares`."""
        return Operator(self._prober).shares(scope, best=best)

    def clear(self, scope: CacheScope) -> Sequence[CacheShare]:
        """Forget it on the server; see :meth:`cache.inspection.Operator.clear`."""
        return Operator(self._prober).clear(scope)

    def close(self) -> None:
        """Stop following, and close the connections."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._client.close()
        self._prober.close()

    # ------------------------------------------------------------------ following

    def start(self) -> None:
        """Follow Redis on a thread of its own until :meth:`close`; twice is harmless."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="darkroom-noise-index", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Catch up with Redis once, on this thread.

        Raises:
            redis.RedisError: it could not be asked.
            IncompatibleServerError: it is too old.
        """
        with self._syncing:
            if not self._available:
                check_version(self._prober)
            with self._lock:
                replicas = list(self._replicas.items())
            for namespace, replica in replicas:
                resyncs = replica.resyncs
                replica.follow(self._prober)
                self._register(namespace, anew=replica.resyncs > resyncs)
            self._available = True

    # ------------------------------------------------------------------ inside

    def _run(self) -> None:
        backoff = Backoff()
        while not self._closing:
            try:
                self.sync()
                backoff.succeeded()
                delay_s = self._poll_s
            except (redis.RedisError, IncompatibleServerError, OSError) as error:
                self._lost(error)
                delay_s = backoff.failed()
            except Exception:  # a value of a kind that nobody foresaw must not end the thread
                _log.exception("the noise cache's index could not be read")
                self._counters.add("errors")
                delay_s = backoff.failed()
            self._wake.wait(delay_s)

    def _replica(self, namespace: Namespace) -> Replica:
        with self._lock:
            replica = self._replicas.get(namespace)
            if replica is None:
                replica = self._replicas[namespace] = Replica(namespace)
                if len(self._replicas) > MAX_REPLICAS:
                    old, gone = self._replicas.popitem(last=False)
                    self._resyncs_before += gone.resyncs
                    self._unread_before += gone.corrupt
                    self._registered_at_s.pop(old, None)
            self._replicas.move_to_end(namespace)
            return replica

    def _register(self, namespace: Namespace, *, anew: bool) -> None:
        now_s = time.time()
        if not anew and now_s - self._registered_at_s.get(namespace, 0.0) < REGISTER_AGAIN_S:
            return
        pipeline = self._prober.pipeline(transaction=False)
        pipeline.zadd(REGISTRY, {namespace.name: now_s})
        pipeline.zremrangebyrank(REGISTRY, 0, -MAX_REGISTERED - 1)
        pipeline.execute()
        self._registered_at_s[namespace] = now_s

    def _common(self) -> list[Any]:
        now = "" if self._now_s is None else repr(self._now_s())
        return [self._policy.name, self._policy.half_life_s, now, self._ttl_s]

    def _call(self, script: Any, namespace: Namespace, arguments: list[Any]) -> Any:
        """Run a script; None when it found nothing or Redis could not be asked in time."""
        if not self._available:
            self._counters.add("skipped")
            return None
        try:
            return script(keys=namespace.keys, args=arguments)
        except (redis.RedisError, OSError) as error:
            self._lost(error)
            return None

    def _lost(self, error: Exception) -> None:
        """Count a failure, and leave the server to the prober until it answers again."""
        timed_out = isinstance(error, redis.TimeoutError | TimeoutError)
        self._counters.add("timeouts" if timed_out else "errors")
        if self._available:
            # The type only: a message of Redis may quote what was sent to it.
            _log.warning("the noise cache's Redis is lost: %s", type(error).__name__)
        self._available = False
        # Whoever takes its place is found by connecting anew, not by asking this one again: a
        # server of a wrong version, or one that has become a replica, answers on and on.
        for client in (self._client, self._prober):
            client.connection_pool.disconnect(inuse_connections=False)

    def _decode(self, namespace: Namespace, id_: str, payload: bytes) -> StoredState | None:
        try:
            return decode(id_, payload)
        except CodecError as error:
            _log.warning("the noise cache drops a state: %s", error)
            self._counters.add("corrupt")
            self._call(self._drop, namespace, [self._log_limit, id_])
            return None
