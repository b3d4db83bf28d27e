"""The tracer of one gateway, and how its spans get out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer
from prometheus_client import Counter

from engine.png import VERSION
from server.telemetry.config import TelemetryConfig
from server.telemetry.export import SpanQueue

MAX_EVENTS = 128
"""Of one span. Of more steps, every so manieth is told."""


class Traces:
    """Makes spans and exports those of sampled requests. Nothing is connected before the first.

    The provider is its own and not the process's: other libraries' spans do not get in, and what
    they find there is what they found before.

    Args:
        spans: counts them by ``outcome``: exported, failed or dropped.
        now_ns: Unix time.

    Attributes:
        tracer: begins spans.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        config: TelemetryConfig,
        spans: Counter,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._queue = SpanQueue(exporter, spans, max_spans=config.max_queued_spans)
        self._flush_timeout_s = config.flush_timeout_s
        # `create` adds what OTEL_RESOURCE_ATTRIBUTES says of where this process runs.
        resource = Resource.create(
            {SERVICE_NAME: config.service_name, SERVICE_VERSION: VERSION.rpartition(" ")[2]}
        )
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=resource,
            span_limits=SpanLimits(max_events=MAX_EVENTS),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._queue)
        self.tracer: Tracer = provider.get_tracer("darkroom")
        self.now_ns = now_ns

    @classmethod
    def over_http(cls, config: TelemetryConfig, spans: Counter) -> Traces:
        """Traces that are posted to the receiver of ``config``."""
        # It says at every try what the queue says once.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
        exporter = OTLPSpanExporter(
            endpoint=config.traces_url,
            headers={name: value.get_secret_value() for name, value in config.headers.items()},
            timeout=config.timeout_s,
            compression=Compression.Gzip,
        )
        return cls(exporter, config, spans)

    def close(self) -> None:
        """Export what waits, within the configured time. Blocks for so long at most."""
        self._queue.close(self._flush_timeout_s)
