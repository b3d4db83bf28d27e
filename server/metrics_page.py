"""Pages of metrics: each process writes its own, and a gateway joins them into one.

Between processes a page is OpenMetrics text, which keeps exemplars. Towards the scraper it is what
that asks for: OpenMetrics, or the older text format of Prometheus, which has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as read_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as read_text
from prometheus_client.registry import Collector

from engine.ports import Clock

Format = Literal["openmetrics", "text"]
CONTENT_TYPES: dict[Format, str] = {
    "openmetrics": openmetrics.CONTENT_TYPE_LATEST,
    "text": exposition.CONTENT_TYPE_PLAIN_0_0_4,
}
_FORGET_AFTER_S = 600.0
_END = b"# EOF\n"


def format_for(accept: str) -> Format:
    """What a scraper that sent this ``Accept`` header reads best."""
    for offer in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in offer.split(";"))
        if kind == "application/openmetrics-text" and "q=0" not in parameters:
            return "openmetrics"
    return "text"


def page_of(registry: CollectorRegistry) -> bytes:
    """Everything in ``registry``, as other processes of ours read it."""
    return bytes(openmetrics.generate_latest(registry))  # type: ignore[no-untyped-call]


def families_of(page: bytes) -> list[Metric]:
    """The families of a page in either format: a worker of the last release may write the older.

    Raises:
        ValueError: it is neither.
    """
    read = read_openmetrics if page.endswith(_END) else read_text
    return list(read(page.decode()))


class Join:
    """Joins the pages of replicas, and remembers for a while who should be among them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen_at_s: dict[str, float] = {}

    def page(self, pages: Sequence[tuple[str, bytes]], format: Format) -> bytes:
        """One page of all; each sample has the label ``replica``."""
        families: dict[str, Metric] = {}
        up: set[str] = set()
        for replica, page in pages:
            try:
                found = families_of(page)
            except ValueError:
                continue  # as good as no answer
            up.add(replica)
            for family in found:
                _merge(families, family, replica)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Fixed([*families.values(), self._health(up)]))
        if format == "openmetrics":
            return page_of(registry)
        return exposition.generate_latest(registry)

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
    """Add the samples under their family's one heading: the formats want each family in one."""
    # Creation times are of no use to anyone here and would double the page. The older format has
    # them as families of their own.
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    if family.samples and not samples:
        return
    into = families.setdefault(
        family.name, Metric(family.name, family.documentation, family.type, family.unit)
    )
    for sample in samples:
        into.add_sample(
            sample.name,
            {**sample.labels, "replica": replica},
            sample.value,
            exemplar=sample.exemplar,
        )


class _Fixed(Collector):
    """A collector of families that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
