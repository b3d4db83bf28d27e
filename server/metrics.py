"""Metrics of a gateway, and the page that joins them with those of routers and workers.

Each process keeps a registry of its own; names begin with ``darkroom_`` and carry their unit.
Labels are bounded: routes are templates, outcomes are the codes of the error table, models and
tenants are those of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine.ports import Clock, SystemClock
from engine.types import Timings
from server.messages import Drawn

_REQUEST_BUCKETS_S = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_PHASE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_FORGET_AFTER_S = 600.0

REFUSALS = frozenset({401, 403, 413, 429, 503})
"""Statuses of requests that were turned away rather than wrong."""


class GatewayMetrics:
    """What one gateway counts.

    Args:
        registry: by default one of its own.
        clock: for when a replica that no longer answers is forgotten.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, clock: Clock | None = None
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._join = _Join(clock or SystemClock())
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

    def ended(self, *, route: str, outcome: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests.labels(route, outcome).inc()
        self.request_seconds.labels(route).observe(seconds)
        if status in REFUSALS:
            self.refusals.labels(outcome).inc()

    def drew(self, pictures: Iterable[Drawn], *, tenant: str) -> None:
        """Count finished pictures and their phases."""
        for picture in pictures:
            self.pictures.labels(picture.model, tenant).inc()
            for phase, seconds in phases(picture.timings):
                self.phase_seconds.labels(phase).observe(seconds)

    def page(self, own_name: str, others: Sequence[tuple[str, bytes]]) -> bytes:
        """Prometheus text of this gateway and of ``others``, each sample with its replica.

        Args:
            others: (replica, its Prometheus text) of those that answered. One that answered within
                the last ten minutes and is not there now is marked by ``darkroom_replica_up`` 0.
        """
        return self._join.page([(own_name, generate_latest(self.registry)), *others])


def phases(timings: Timings) -> tuple[tuple[str, float], ...]:
    """(phase, seconds) of a picture, in order."""
    return (
        ("queue", timings.queue_s),
        ("encode", timings.encode_s),
        ("cache", timings.cache_s),
        ("denoise", timings.denoise_s),
        ("decode", timings.decode_s),
    )


class _Join:
    """Joins pages, and remembers for a while who should be among them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen_at_s: dict[str, float] = {}

    def page(self, pages: Sequence[tuple[str, bytes]]) -> bytes:
        families: dict[str, Metric] = {}
        up: set[str] = set()
        for replica, text in pages:
            try:
                found = list(text_string_to_metric_families(text.decode()))
            except ValueError:
                continue  # neither text nor Prometheus's: as good as no answer
            up.add(replica)
            for family in found:
                _merge(families, family, replica)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Fixed([*families.values(), self._health(up)]))
        return generate_latest(registry)

    def _health(self, up: set[str]) -> GaugeMetricFamily:
        now_s = self._clock.now_s()
        self._seen_at_s |= dict.fromkeys(up, now_s)
        self._seen_at_s = {
            name: at_s for name, at_s in self._seen_at_s.items() if now_s - at_s < _FORGET_AFTER_S
        }
        health = GaugeMetricFamily(
            "darkroom_replica_up",
            "Whether the replica's own metrics are on this page; 0 for ten minutes after the last.",
            labels=("replica",),
        )
        for name in sorted(self._seen_at_s):
            health.add_metric((name,), float(name in up))
        return health


def _merge(families: dict[str, Metric], family: Metric, replica: str) -> None:
    """Add the samples under their family's one heading: the format wants each family in one."""
    into = families.setdefault(
        family.name, Metric(family.name, family.documentation, family.type, family.unit)
    )
    for sample in family.samples:
        # Creation times are of no use to anyone here and would double the page.
        if not sample.name.endswith("_created"):
            into.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)


class _Fixed:
    """A collector of families that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
