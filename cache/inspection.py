"""What an operator may see and do on the Redis of a noise cache: list, look, clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import redis

from cache import scripts
from cache.keys import REGISTRY, Namespace

_LOG_LIMIT_AFTER_CLEAR = 16


@dataclass(frozen=True, slots=True)
class StateReport:
    """One stored state: its score, uses, charged bytes, kind and level."""

    state: str
    score: float
    uses: int
    size_bytes: int
    kind: str
    log_snr: float


@dataclass(frozen=True, slots=True)
class NamespaceReport:
    """What a namespace holds; ``best`` are its states of the highest scores."""

    namespace: Namespace
    states: int
    size_bytes: int
    best: tuple[StateReport, ...]


class Operator:
    """Looks into the namespaces on a server. The client stays the caller's.

    Every method raises ``redis.RedisError`` where Redis cannot be asked: an operator wants to know.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._clear = client.register_script(scripts.CLEAR)

    def namespaces(self) -> list[Namespace]:
        """Those that any worker has opened, the most recent first."""
        listed = cast(list[bytes], self._client.zrevrange(REGISTRY, 0, -1))
        return [Namespace.named(item.decode()) for item in listed]

    def look(self, namespace: Namespace, *, best: int = 0) -> NamespaceReport:
        """Sizes of a namespace, and its ``best`` states."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.get(namespace.size)
        pipeline.zcard(namespace.scores)
        pipeline.zrevrange(namespace.scores, 0, max(best, 1) - 1, withscores=True)
        size, states, highest = pipeline.execute()
        return NamespaceReport(
            namespace, int(states), int(size or 0), self._states(namespace, highest[:best])
        )

    def clear(self, namespace: Namespace) -> int:
        """Forget a namespace; every worker's index follows. Says how many states there were."""
        answer: Any = self._clear(keys=namespace.keys, args=[_LOG_LIMIT_AFTER_CLEAR])
        return int(answer)

    def _states(
        self, namespace: Namespace, highest: list[tuple[bytes, float]]
    ) -> tuple[StateReport, ...]:
        if not highest:
            return ()
        names = [f"m:{state.decode()}" for state, _ in highest]
        told = cast(list[bytes | None], self._client.hmget(namespace.states, names))
        reports = []
        for (state, score), meta in zip(highest, told, strict=True):
            if meta is not None:  # None: evicted between both commands
                charge, uses, kind, log_snr = meta.decode().split("|")
                reports.append(
                    StateReport(state.decode(), score, int(uses), int(charge), kind, float(log_snr))
                )
        return tuple(reports)
