"""What the router knows, as a page of metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.loop_metrics import watch_loop
from server.messages import Load
from server.metrics_page import page_of


class RouterMetrics:
    """Gauges are set when they are asked for; counters count as things happen."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        watch_loop(self._registry)
        self._gauges = {
            name: Gauge(f"darkroom_router_{name}", text, registry=self._registry)
            for name, text in (
                ("queued", "Pictures that wait for a worker."),
                ("queued_steps", "Steps that wait: UNet rows at native size."),
                ("running", "Pictures that are granted to a worker."),
                ("running_steps", "Steps that are left of those."),
                ("steps_per_s", "What all workers together do at saturation."),
            )
        }
        self._workers = Gauge(
            "darkroom_router_workers", "Workers that report.", registry=self._registry
        )
        self.grants = Counter(
            "darkroom_router_grants", "Pictures sent to a worker.", registry=self._registry
        )
        self.refusals = Counter(
            "darkroom_router_refusals",
            "Requests that were not admitted, decided by the router.",
            ("reason",),
            registry=self._registry,
        )
        self.lost_workers = Counter(
            "darkroom_router_lost_workers",
            "Times that a gateway could not reach a worker.",
            registry=self._registry,
        )
        self.orphans = Counter(
            "darkroom_router_orphans",
            "Tasks that were cancelled because nobody waited for them any more.",
            registry=self._registry,
        )

    def text(self, load: Load, workers: int) -> bytes:
        """Everything, as of now."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(load, name))
        self._workers.set(workers)
        return page_of(self._registry)
