"""Spans on their way out: a bounded queue, and a thread that posts what is in it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import Counter

_log = logging.getLogger(__name__)

_BATCH = 256
"""Spans of one export: with their events some hundred kilobytes."""
_EVERY_S = 1.0


class SpanQueue(SpanProcessor):
    """Hands finished spans to ``exporter`` from a thread of its own, which the first one starts.

    Whoever ends a span never waits: past ``max_spans`` it is dropped. Every span is counted once,
    as exported, failed (the receiver did not take it) or dropped. The SDK's own batch processor
    drops without a count, and its shutdown may take half a minute.

    Args:
        counter: with the label ``outcome``.
        every_s: the longest that a span waits for others.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        counter: Counter,
        *,
        max_spans: int,
        every_s: float = _EVERY_S,
    ) -> None:
        self._exporter = exporter
        self._counter = counter
        self._max_spans = max_spans
        self._every_s = every_s
        self._changed = threading.Condition()
        self._waiting: deque[ReadableSpan] = deque()
        self._closing = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def on_end(self, span: ReadableSpan) -> None:
        """Take a finished span, or drop it."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._changed:
            if self._closing or len(self._waiting) >= self._max_spans:
                self._count("dropped", 1)
                return
            self._waiting.append(span)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
                self._thread.start()
            elif len(self._waiting) in (1, _BATCH):
                self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Export what waits, for at most ``timeout_s`` seconds; the rest is dropped."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            self._count("dropped", len(self._waiting))
            self._waiting.clear()
        self._exporter.shutdown()  # ends a pause between two tries; the thread ends after it

    # ------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        while batch := self._next():
            self._export(batch)

    def _next(self) -> list[ReadableSpan]:
        """The next spans to export; none when there will be no more."""
        with self._changed:
            while not (self._waiting or self._closing):
                self._changed.wait()
            until_s = time.monotonic() + self._every_s
            while not self._closing and len(self._waiting) < _BATCH:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]

    def _export(self, batch: list[ReadableSpan]) -> None:
        try:
            taken = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:  # the exporter's own fault: the thread has to outlive it
            _log.exception("the exporter of traces failed")
            taken = False
        self._count("exported" if taken else "failed", len(batch))
        if self._failing is taken:  # once for every change, not for every batch
            self._failing = not taken
            if taken:
                _log.info("the receiver of traces takes them again")
            else:
                _log.warning("the receiver of traces takes none; they are lost, and counted")

    def _count(self, outcome: str, spans: int) -> None:
        self._counter.labels(outcome).inc(spans)
