"""What a worker measures, in a registry of its own; the gateway collects its text.

Labels are bounded: configured models, phases, and the codes of the error table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)
from prometheus_client.registry import Collector

from server.errors import row_of
from server.exemplars import exemplar_of_task
from server.loop_metrics import watch_loop
from server.memory import used_bytes
from server.messages import Drawn
from server.metrics_page import page_of

_TICK_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_PHASE_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_FILL_BUCKETS = (0.125, 0.25, 0.5, 0.75, 1.0)


class WorkerMetrics:
    """The instruments. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        watch_loop(registry)
        model = ("model",)
        self._tick_s = Histogram(
            "darkroom_tick_seconds",
            "One tick of the step loop.",
            model,
            buckets=_TICK_BUCKETS_S,
            registry=registry,
        )
        self._tick_rows = Histogram(
            "darkroom_tick_rows",
            "UNet rows of one tick.",
            model,
            buckets=_ROW_BUCKETS,
            registry=registry,
        )
        self._fill = Histogram(
            "darkroom_tick_fill_ratio",
            "UNet rows of one tick, as a part of the saturation batch.",
            model,
            buckets=_FILL_BUCKETS,
            registry=registry,
        )
        self._saturation = Gauge(
            "darkroom_saturation_rows",
            "The saturation batch of the lane that ran last.",
            model,
            registry=registry,
        )
        self._steps = Counter(
            "darkroom_steps", "Steps done, over all pictures.", model, registry=registry
        )
        self._phase_s = Histogram(
            "darkroom_phase_seconds",
            "Time of one picture in each phase.",
            ("model", "phase"),
            buckets=_PHASE_BUCKETS_S,
            registry=registry,
        )
        self._pictures = Counter(
            "darkroom_pictures", "Pictures that left the worker.", model, registry=registry
        )
        self._failures = Counter(
            "darkroom_failures",
            "Tasks that ended without a picture, by the code of the error.",
            ("model", "code"),
            registry=registry,
        )
        self._cancel_s = Histogram(
            "darkroom_cancel_seconds",
            "From the cancel of a task here to its trajectory out of the step loop.",
            buckets=_TICK_BUCKETS_S,
            registry=registry,
        )
        self._splits = Counter(
            "darkroom_out_of_memory_splits",
            "Batches that did not fit into memory and were split.",
            model,
            registry=registry,
        )
        self._snapshots = Counter(
            "darkroom_snapshot_bytes", "Bytes of snapshots sent away.", registry=registry
        )
        self._loads = Counter(
            "darkroom_model_loads", "Times a model was loaded.", model, registry=registry
        )
        self._unloads = Counter(
            "darkroom_model_unloads", "Times a model was unloaded.", model, registry=registry
        )
        self._model_bytes = Gauge(
            "darkroom_model_memory_bytes",
            "Memory that a loaded model takes; 0 while it is not loaded.",
            model,
            registry=registry,
        )
        self._load_s = Histogram(
            "darkroom_model_load_seconds",
            "Time to open a model and warm it up.",
            model,
            buckets=_PHASE_BUCKETS_S,
            registry=registry,
        )
        self.watch(
            "darkroom_worker_resident_memory_bytes",
            "Memory of this process.",
            lambda: used_bytes(torch.device("cpu")),
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when the metrics are."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def collect(self, collector: Collector) -> None:
        """Ask ``collector`` too, whenever the metrics are read."""
        self._registry.register(collector)

    def ticked(self, model: str, *, members: int, rows: int, seconds: float, most: int) -> None:
        """A tick is done; ``most`` is the saturation batch of its lane."""
        self._tick_s.labels(model).observe(seconds)
        self._tick_rows.labels(model).observe(rows)
        self._fill.labels(model).observe(rows / most)
        self._saturation.labels(model).set(most)
        self._steps.labels(model).inc(members)

    def drawn(self, model: str, picture: Drawn, *, request_id: str) -> None:
        """A picture leaves; ``request_id`` is its task's."""
        exemplar = exemplar_of_task(request_id)
        self._pictures.labels(model).inc()
        times = picture.timings
        for phase in ("queue", "encode", "cache", "denoise", "decode"):
            self._phase_s.labels(model, phase).observe(getattr(times, f"{phase}_s"), exemplar)

    def failed(self, model: str, error: Exception) -> None:
        """A task ended without a picture."""
        self._failures.labels(model, row_of(error).code).inc()

    def cancelled(self, seconds: float) -> None:
        """A task that nobody wants any more has left the step loop."""
        self._cancel_s.observe(seconds)

    def split(self, model: str) -> None:
        """A batch did not fit into memory."""
        self._splits.labels(model).inc()

    def snapshot(self, size_bytes: int) -> None:
        """A snapshot leaves."""
        self._snapshots.inc(size_bytes)

    def loaded(self, model: str, *, size_bytes: int, seconds: float) -> None:
        """A model is loaded and warm."""
        self._loads.labels(model).inc()
        self._model_bytes.labels(model).set(size_bytes)
        self._load_s.labels(model).observe(seconds)

    def unloaded(self, model: str) -> None:
        """A model is closed."""
        self._unloads.labels(model).inc()
        self._model_bytes.labels(model).set(0)

    def text(self) -> bytes:
        """Everything, as a page of metrics."""
        return page_of(self._registry)
