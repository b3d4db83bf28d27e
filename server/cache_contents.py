"""What the noise cache of the application holds, from one Redis or from the memory of workers.

The route and the command line say the same of both, in the same words.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from engine.types import CacheShare
from server.config import RedisConfig, ServeConfig
from server.messages import CacheAnswer
from server.schemas.cache import CacheCleared, CacheForgotten, CacheReport, CacheState, WorkerCache
from server.schemas.cache import CacheShare as ShareReply

if TYPE_CHECKING:
    from cache.inspection import Operator

Backend = Literal["off", "memory", "redis"]
Names = Mapping[str, Sequence[str]]
"""Ids of the served models, by the fingerprint of their checkpoint."""

_TIMEOUT_S = 5.0


def backend_of(config: ServeConfig) -> Backend:
    """Where the noise cache of a configuration is."""
    if not config.cache.enabled:
        return "off"
    return "memory" if config.redis.url is None else "redis"


@contextmanager
def redis_operator(config: RedisConfig) -> Iterator[Operator]:
    """The operator of a configured Redis, which is asked with a patience of seconds."""
    from cache.inspection import Operator  # whoever has no Redis need not import its client
    from server.redis_settings import redis_settings

    client = redis_settings(config, _TIMEOUT_S).client(_TIMEOUT_S)
    try:
        yield Operator(client)
    finally:
        client.close()


def on_redis(
    config: ServeConfig, shares: Sequence[CacheShare], names: Names, *, best: int
) -> CacheReport:
    """What Redis holds."""
    held = [(None, share) for share in shares]
    return _report(config, held, names, best=best, limit_bytes=config.cache.max_bytes)


def in_memory(
    config: ServeConfig, answers: Sequence[CacheAnswer], names: Names, *, best: int
) -> CacheReport:
    """What the workers hold, each in its own memory: summed, and by worker."""
    answered = [(it.worker, it.shares) for it in answers if it.shares is not None]
    held = [(worker, share) for worker, shares in answered for share in shares]
    limit_bytes = config.cache.max_bytes * len(answered)
    report = _report(config, held, names, best=best, limit_bytes=limit_bytes)
    report.workers = [
        WorkerCache(
            worker=worker,
            entries=sum(share.entries for share in shares),
            states=sum(share.states for share in shares),
            bytes=sum(share.size_bytes for share in shares),
        )
        for worker, shares in answered
    ]
    report.missing = [answer.worker for answer in answers if answer.shares is None]
    return report


def forgotten(shares: Sequence[CacheShare], names: Names) -> CacheCleared:
    """What was cleared, summed over the workers."""
    return CacheCleared(
        entries=sum(share.entries for share in shares),
        states=sum(share.states for share in shares),
        bytes=sum(share.size_bytes for share in shares),
        shares=[
            CacheForgotten(
                tenant=tenant,
                checkpoint=checkpoint,
                models=list(names.get(checkpoint, ())),
                entries=sum(share.entries for _, share in parts),
                states=sum(share.states for _, share in parts),
                bytes=sum(share.size_bytes for _, share in parts),
            )
            for (tenant, checkpoint), parts in _by_share([(None, share) for share in shares])
        ],
    )


# ---------------------------------------------------------------------- sums

_Held = tuple[str | None, CacheShare]
"""(the worker in whose memory it is, or None; what it holds)."""


def _report(
    config: ServeConfig, held: Sequence[_Held], names: Names, *, best: int, limit_bytes: int
) -> CacheReport:
    return CacheReport(
        backend=backend_of(config),
        policy=config.cache.policy,
        limit_bytes=config.cache.max_bytes,
        entries=sum(share.entries for _, share in held),
        states=sum(share.states for _, share in held),
        bytes=sum(share.size_bytes for _, share in held),
        shares=[
            ShareReply(
                tenant=tenant,
                checkpoint=checkpoint,
                models=list(names.get(checkpoint, ())),
                entries=sum(share.entries for _, share in parts),
                states=sum(share.states for _, share in parts),
                bytes=sum(share.size_bytes for _, share in parts),
                limit_bytes=limit_bytes,
                best=_best(parts, best),
            )
            for (tenant, checkpoint), parts in _by_share(held)
        ],
        workers=[],
        missing=[],
    )


def _by_share(held: Sequence[_Held]) -> list[tuple[tuple[str | None, str], list[_Held]]]:
    """What belongs to the same tenant and checkpoint together; the largest first."""
    found: defaultdict[tuple[str | None, str], list[_Held]] = defaultdict(list)
    for worker, share in held:
        found[share.tenant, share.checkpoint].append((worker, share))
    return sorted(found.items(), key=lambda item: -sum(s.size_bytes for _, s in item[1]))


def _best(parts: Sequence[_Held], count: int) -> list[CacheState]:
    states = [
        CacheState(
            id=state.id,
            kind=state.kind,
            log_snr=state.log_snr if math.isfinite(state.log_snr) else None,
            uses=state.uses,
            bytes=state.size_bytes,
            score=state.score,
            worker=worker,
        )
        for worker, share in parts
        for state in share.best
    ]
    return heapq.nlargest(count, states, key=lambda state: state.score)
