"""What an operator may see and do on the Redis of a noise cache: look and clear."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import redis

from cache import scripts
from cache.index import entry_of
from cache.keys import REGISTRY, Namespace
from engine.errors import BackendUnavailableError
from engine.types import CachedState, CacheScope, CacheShare

_LOG_LIMIT_AFTER_CLEAR = 16
_LOOK_AT_ONCE = 500
_SCAN_COUNT = 1000

_log = logging.getLogger(__name__)


class Operator:
    """Looks into the namespaces on a server. The client stays the caller's.

    Unlike what requests call, it says when Redis cannot be asked: every method raises
    ``BackendUnavailableError`` then. What is on the server and no noise cache wrote is left out,
    and the log says how much: one bad value hides nobody else's states, nor keeps them.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._clear = client.register_script(scripts.CLEAR)

    def shares(self, scope: CacheScope, *, best: int = 0) -> list[CacheShare]:
        """What is held within ``scope``, the largest share first, each with its ``best`` states."""
        with _asking():
            found = [
                share
                for namespace, size_bytes, states in self._sizes(scope)
                if states and (share := self._share(namespace, size_bytes, states, best))
            ]
        return sorted(found, key=lambda share: -share.size_bytes)

    def clear(self, scope: CacheScope) -> list[CacheShare]:
        """Forget what is held within ``scope``; every worker's index follows."""
        gone = []
        with _asking():
            for namespace in self._namespaces(scope):
                answer: Any = self._clear(keys=namespace.keys, args=[_LOG_LIMIT_AFTER_CLEAR])
                entries, states, size_bytes = (int(count) for count in answer)
                if states:
                    gone.append(_share(namespace, entries, states, size_bytes))
        return gone

    # ------------------------------------------------------------------ inside

    def _namespaces(self, scope: CacheScope) -> list[Namespace]:
        """Those that any worker has opened, the most recent first."""
        listed = cast(list[bytes], self._client.zrevrange(REGISTRY, 0, -1))
        known = [name for item in listed if (name := _namespace(item)) is not None]
        _tell_left_out(len(listed) - len(known), "members of the registry")
        return [name for name in known if scope.covers(name.tenant, name.checkpoint)]

    def _sizes(self, scope: CacheScope) -> Iterator[tuple[Namespace, int, int]]:
        """(namespace, charged bytes, states) of each, a few hundred in a round trip."""
        left_out = 0
        for part in _batches(self._namespaces(scope), _LOOK_AT_ONCE):
            pipeline = self._client.pipeline(transaction=False)
            for namespace in part:
                pipeline.get(namespace.size)
                pipeline.zcard(namespace.scores)
            answers = pipeline.execute(raise_on_error=False)
            for namespace, size, states in zip(part, answers[::2], answers[1::2], strict=True):
                try:
                    sizes = int(_told(size) or 0), int(_told(states))
                except ValueError:
                    left_out += 1
                else:
                    yield namespace, *sizes
        _tell_left_out(left_out, "namespaces")

    def _share(
        self, namespace: Namespace, size_bytes: int, states: int, best: int
    ) -> CacheShare | None:
        """None for a namespace whose keys hold something else."""
        try:
            scanned = self._client.zscan_iter(namespace.scores, count=_SCAN_COUNT)
            entries = len({entry_of(state.decode(errors="replace")) for state, _ in scanned})
            return _share(namespace, entries, states, size_bytes, self._best(namespace, best))
        except redis.ResponseError as error:
            if not _is_of_another_type(error):
                raise
            _tell_left_out(1, "namespaces")
            return None

    def _best(self, namespace: Namespace, count: int) -> tuple[CachedState, ...]:
        if not count:
            return ()
        highest = cast(
            list[tuple[bytes, float]],
            self._client.zrevrange(namespace.scores, 0, count - 1, withscores=True),
        )
        if not highest:
            return ()
        names = [b"m:" + state for state, _ in highest]
        told = cast(list[bytes | None], self._client.hmget(namespace.states, names))
        there = [  # what is not was evicted between both commands
            (state, score, meta)
            for (state, score), meta in zip(highest, told, strict=True)
            if meta is not None
        ]
        read = [found for about in there if (found := _state(*about)) is not None]
        _tell_left_out(len(there) - len(read), "states")
        return tuple(read)


def _namespace(item: bytes) -> Namespace | None:
    try:
        return Namespace.named(item.decode())
    except ValueError:
        return None


def _state(name: bytes, score: float, meta: bytes) -> CachedState | None:
    try:
        charge, uses, kind, log_snr = meta.decode().split("|")
        read = CachedState(
            id=name.decode(),
            kind=kind,
            log_snr=float(log_snr),
            uses=int(uses),
            size_bytes=int(charge),
            score=score,
        )
    except ValueError:
        return None
    return read if math.isfinite(score) else None


def _told(answer: Any) -> Any:
    """An answer out of a pipeline.

    Raises:
        ValueError: the key holds something else.
        redis.RedisError: Redis could not be asked.
    """
    if _is_of_another_type(answer):
        raise ValueError("a key of another type")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _is_of_another_type(answer: Any) -> bool:
    return isinstance(answer, redis.ResponseError) and str(answer).startswith("WRONGTYPE")


def _tell_left_out(count: int, what: str) -> None:
    if count:
        _log.warning("the noise cache leaves out %d %s on Redis: not readable", count, what)


def _share(
    namespace: Namespace,
    entries: int,
    states: int,
    size_bytes: int,
    best: tuple[CachedState, ...] = (),
) -> CacheShare:
    return CacheShare(
        tenant=namespace.tenant,
        checkpoint=namespace.checkpoint,
        entries=entries,
        states=states,
        size_bytes=size_bytes,
        best=best,
    )


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        # The type only: a message of Redis may quote what was sent to it.
        raise BackendUnavailableError(
            f"the noise cache's Redis cannot be asked: {type(error).__name__}"
        ) from error


def _batches(items: Sequence[Namespace], size: int) -> Iterator[Sequence[Namespace]]:
    return (items[at : at + size] for at in range(0, len(items), size))
