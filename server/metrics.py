"""Metrics of a gateway, and the page that joins them with those of routers and workers.

Each process keeps a registry of its own; names begin with ``darkroom_`` and carry their unit.
Labels are bounded: routes are templates, outcomes are the codes of the error table, models and
tenants are those of the configuration.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.ports import Clock, SystemClock
from engine.types import Timings
from server.exemplars import exemplar_of
from server.jobs.metrics import JobMetrics
from server.loop_metrics import watch_loop
from server.messages import Drawn
from server.metrics_page import Format, Join, page_of

_REQUEST_BUCKETS_S = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_PHASE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)

REFUSALS = frozenset({401, 403, 413, 429, 503})
"""Statuses of requests that were turned away rather than wrong."""


class GatewayMetrics:
    """What one gateway counts.

    Args:
        registry: by default one of its own.
        clock: for when a replica that no longer answers is forgotten.
        name: the label ``replica`` of what it counts; by default of this process.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.registry = registry or CollectorRegistry()
        # Two gateways of one machine share the host's name, two of a cluster may share the number.
        self.name = name or f"gateway-{socket.gethostname()}-{os.getpid()}"
        self._join = Join(clock or SystemClock())
        self.requests = Counter(
            "darkroom_http_requests",
            "Requests that have ended; the outcome is ok or the error's code.",
            ("route", "outcome"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "darkroom_http_request_seconds",
            "From a request's head to the last byte of its reply.",
            ("route",),
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "darkroom_http_requests_in_flight",
            "Requests that have begun and not ended.",
            registry=self.registry,
        )
        self.refusals = Counter(
            "darkroom_http_refusals",
            "Requests turned away, by the error's code.",
            ("reason",),
            registry=self.registry,
        )
        self.gateway_refusals = Counter(
            "darkroom_gateway_refusals",
            "Requests that were not admitted, decided here by what the router had said.",
            ("reason",),
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "darkroom_picture_phase_seconds",
            "Time of a picture's phases, as its worker measured them.",
            ("phase",),
            buckets=_PHASE_BUCKETS_S,
            registry=self.registry,
        )
        self.first_preview_seconds = Histogram(
            "darkroom_first_preview_seconds",
            "From a streaming request's head to its first preview.",
            buckets=_PHASE_BUCKETS_S,
            registry=self.registry,
        )
        self.pictures = Counter(
            "darkroom_gateway_pictures",
            "Pictures handed out.",
            ("model", "tenant"),
            registry=self.registry,
        )
        self.trace_spans = Counter(
            "darkroom_trace_spans",
            "Spans of traces: exported, failed (the receiver took them not), or dropped.",
            ("outcome",),
            registry=self.registry,
        )
        self.jobs = JobMetrics(self.registry)
        watch_loop(self.registry)

    def ended(
        self,
        *,
        route: str,
        outcome: str,
        status: int,
        seconds: float,
        request_id: str | None = None,
        trace_id: str | None = None,
    ) -> None:
        """Count a request that has ended."""
        self.requests.labels(route, outcome).inc()
        self.request_seconds.labels(route).observe(seconds, exemplar_of(request_id, trace_id))
        if status in REFUSALS:
            self.refusals.labels(outcome).inc()

    def drew(
        self, pictures: Iterable[Drawn], *, tenant: str, request_id: str | None = None
    ) -> None:
        """Count finished pictures and their phases."""
        exemplar = exemplar_of(request_id)
        for picture in pictures:
            self.pictures.labels(picture.model, tenant).inc()
            for phase, seconds in phases(picture.timings):
                self.phase_seconds.labels(phase).observe(seconds, exemplar)

    def previewed(self, seconds: float, *, request_id: str | None = None) -> None:
        """Count a request's first preview, ``seconds`` after its head."""
        self.first_preview_seconds.observe(seconds, exemplar_of(request_id))

    def own_page(self) -> tuple[str, bytes]:
        """(this replica, what it counts), for another gateway's page."""
        return self.name, page_of(self.registry)

    def page(self, others: Sequence[tuple[str, bytes]], *, format: Format = "text") -> bytes:
        """The metrics of this gateway and of ``others``, each sample with its replica.

        Args:
            others: (replica, its page) of those that answered. One that answered within the last
                ten minutes and is not there now is marked by ``darkroom_replica_up`` 0.
        """
        return self._join.page([self.own_page(), *others], format)


def phases(timings: Timings) -> tuple[tuple[str, float], ...]:
    """(phase, seconds) of a picture, in order."""
    return (
        ("queue", timings.queue_s),
        ("encode", timings.encode_s),
        ("cache", timings.cache_s),
        ("denoise", timings.denoise_s),
        ("decode", timings.decode_s),
    )
