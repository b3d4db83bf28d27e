"""What a namespace is charged for what it holds, and the counters that both stores keep."""

from __future__ import annotations

import threading
from collections import Counter

from engine.ports import CacheStatistics, Embedding

STATE_OVERHEAD_BYTES = 384
"""Beside its payload, what Redis 7 spends on a state: hash fields for payload and bookkeeping, and
a member of the sorted set. Rounded up from ``MEMORY USAGE``, so that a limit holds in fact."""

ENTRY_OVERHEAD_BYTES = 256
MAX_CLAIMS = 32
"""Prompts that may each use an entry's ``NOISY`` states once; after that it serves no more."""
CLAIM_BYTES = 33
"""A claim's 32 hex digits and a separator, as stored."""


def entry_bytes(embedding: Embedding | None, *, exclusive: bool) -> int:
    """Charge of an entry: its embedding in half precision, and room for its claims."""
    vector = 0 if embedding is None else 2 * embedding.size
    return ENTRY_OVERHEAD_BYTES + vector + (MAX_CLAIMS * CLAIM_BYTES if exclusive else 0)


def state_bytes(payload: bytes) -> int:
    """Charge of a state."""
    return STATE_OVERHEAD_BYTES + len(payload)


class Counters:
    """Named counts since the cache was opened. Safe from any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count; ``name`` is a counter of :class:`~engine.ports.CacheStatistics`."""
        with self._lock:
            self._counts[name] += count

    def statistics(self, **contents: object) -> CacheStatistics:
        """The counts, with what the caller knows of the contents."""
        with self._lock:
            counts = dict(self._counts)
        return CacheStatistics(**{**counts, **contents})  # type: ignore[arg-type]
