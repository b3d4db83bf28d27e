"""The engine's traffic with its noise cache, kept off the critical path: looks that are cut short,
and a thread that writes what it can.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from engine.ports import CacheKey, Clock, NoiseCache, Offer

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

LOOK_THREADS = 4


class SlowCacheError(Exception):
    """The cache gave no answer within the budget. Never leaves the engine: it is a miss."""


class Looker:
    """Runs looks into the cache on threads of its own, and waits for each for a bounded time.

    A look that takes longer goes on unheard. As many as there are threads may be stuck; while they
    are, further looks fail at once.
    """

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._free = threading.BoundedSemaphore(LOOK_THREADS)
        self._threads = ThreadPoolExecutor(LOOK_THREADS, thread_name_prefix="darkroom-noise-look")

    def look(self, ask: Callable[[], _T]) -> _T:
        """What ``ask`` answers.

        Raises:
            SlowCacheError: not within the budget.
            Exception: what ``ask`` raised.
        """
        if not self._free.acquire(blocking=False):
            raise SlowCacheError
        answer: Future[_T] = self._threads.submit(ask)
        answer.add_done_callback(lambda _: self._free.release())
        try:
            return answer.result(self._budget_s)
        except FutureTimeoutError:
            raise SlowCacheError from None

    def close(self) -> None:
        """Take no more; stuck looks end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class OfferWriter:
    """Offers states to the cache on a thread of its own. What does not fit its queue is dropped.

    Args:
        on_written: told of each offer's outcome and seconds, on the writer's thread.
    """

    def __init__(
        self,
        cache: NoiseCache,
        *,
        max_pending: int,
        clock: Clock,
        on_written: Callable[[bool, float], None],
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._on_written = on_written
        self._pending: queue.Queue[tuple[CacheKey, Offer] | None] = queue.Queue(max_pending)
        self._thread = threading.Thread(target=self._run, name="darkroom-noise-write", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, key: CacheKey, offer: Offer) -> bool:
        """Queue an offer; False where the queue is full and it is dropped. Returns at once."""
        try:
            self._pending.put_nowait((key, offer))
        except queue.Full:
            return False
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then stop; what takes longer is left unwritten."""
        if self._thread.is_alive():
            try:
                self._pending.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._pending.get()) is not None:
            began_s = self._clock.now_s()
            try:
                stored = self._cache.offer(*item)
            except Exception:  # a bug of the cache's: it may cost states, never the thread
                _log.exception("offering states to the noise cache failed")
                stored = False
            self._on_written(stored, self._clock.now_s() - began_s)
