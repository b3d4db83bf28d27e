"""Token buckets, one a key: a minute's worth may come at once, and refills evenly.

Each gateway process counts on its own. With several, a key may use its rate at each of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from engine.ports import Clock
from server.errors import RateLimitedError


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RateLimiter:
    """Counts requests against the rate of their key.

    Memory is bounded by ``max_keys``: past it, the bucket that was used longest ago is forgotten,
    which is as good as full unless more keys than that are busy in one minute.
    """

    def __init__(self, clock: Clock, *, max_keys: int = 10_000) -> None:
        self._clock = clock
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key_id: str, per_minute: float | None) -> None:
        """Count one request of ``key_id``.

        Args:
            per_minute: the rate, and the most that may come at once; None for no limit.

        Raises:
            RateLimitedError: with the seconds until the next request is allowed.
        """
        if per_minute is None:
            return
        now_s = self._clock.now_s()
        burst = max(1.0, per_minute)
        bucket = self._buckets.pop(key_id, None) or _Bucket(burst, now_s)
        refilled = bucket.tokens + (now_s - bucket.at_s) * per_minute / 60.0
        bucket.tokens, bucket.at_s = min(burst, refilled), now_s
        self._buckets[key_id] = bucket
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1.0:
            raise RateLimitedError(
                f"the key's rate of {per_minute:g} requests a minute is used up",
                retry_after_s=(1.0 - bucket.tokens) * 60.0 / per_minute,
            )
        bucket.tokens -= 1.0
