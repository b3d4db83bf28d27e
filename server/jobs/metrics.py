"""What a gateway counts of its jobs and of their webhooks."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.jobs.records import FINAL, Status

Delivery = Literal["delivered", "retried", "given_up"]
"""What became of one try to deliver a webhook; ``retried`` is followed by another one."""
_SECONDS_BUCKETS_S = (1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)


class JobMetrics:
    """The instruments. Every series is there from the start, so that a first failure is a rise."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge(
            "darkroom_jobs",
            "Jobs that this gateway owns and that have not ended.",
            ("status",),
            registry=registry,
        )
        self._ended = Counter(
            "darkroom_jobs_ended",
            "Jobs that have ended on this gateway.",
            ("outcome",),
            registry=registry,
        )
        self._seconds = Histogram(
            "darkroom_job_seconds",
            "From the making of a job to its end.",
            ("outcome",),
            buckets=_SECONDS_BUCKETS_S,
            registry=registry,
        )
        self._webhooks = Counter(
            "darkroom_webhook_deliveries",
            "Tries to deliver a webhook, by what became of them.",
            ("outcome",),
            registry=registry,
        )
        for status in FINAL:
            self._ended.labels(status)
            self._seconds.labels(status)
        for delivery in get_args(Delivery):
            self._webhooks.labels(delivery)

    def watch(self, statuses: Callable[[], Iterable[Status]]) -> None:
        """Count open jobs whenever the metrics are read; ``statuses`` names that of each."""

        def count(status: Status) -> float:
            return float(Tally(statuses())[status])

        for status in get_args(Status):
            if status not in FINAL:
                self._open.labels(status).set_function(partial(count, status))

    def ended(self, outcome: Status, seconds: float) -> None:
        """A job has ended, so long after it was made."""
        self._ended.labels(outcome).inc()
        self._seconds.labels(outcome).observe(max(0.0, seconds))  # gateways' clocks may differ

    def delivery(self, outcome: Delivery) -> None:
        """A try to deliver a webhook is over."""
        self._webhooks.labels(outcome).inc()
