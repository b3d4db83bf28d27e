"""What the HTTP interfaces share. Built once by whoever starts a gateway, and injected."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.auth import KeyRing
from server.config import ServeConfig
from server.dispatch import Dispatcher
from server.jobs.memory import MemoryJobStore
from server.jobs.runner import JobRunner
from server.jobs.store import Bounds, JobStore
from server.metrics import GatewayMetrics
from server.telemetry.opening import open_traces

if TYPE_CHECKING:
    from server.telemetry.traces import Traces


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that a route may use. It does not own the dispatcher."""

    config: ServeConfig
    dispatcher: Dispatcher
    keys: KeyRing
    jobs: JobRunner
    metrics: GatewayMetrics
    traces: Traces | None = None

    async def start(self) -> None:
        """Begin the background work; in the event loop that serves, before the first request."""
        await self.jobs.start()

    async def close(self, timeout_s: float) -> None:
        """Finish or hand over jobs. Call it before the dispatcher is closed: jobs draw on it."""
        await self.jobs.close(timeout_s)

    async def flush(self) -> None:
        """Send the last spans, within the configured time. Call it when every reply has ended."""
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)


def open_services(
    config: ServeConfig, dispatcher: Dispatcher, *, metrics: GatewayMetrics | None = None
) -> Services:
    """What ``config`` describes, over ``dispatcher``. Nothing is connected yet.

    Args:
        metrics: where the dispatcher counts already; by default new ones.

    Raises:
        InvalidRequestError: keys or Redis are configured wrongly.
        BackendUnavailableError: traces are asked for, and not installed.
    """
    metrics = metrics or GatewayMetrics()
    traces = open_traces(config.telemetry, metrics.trace_spans)
    if traces is not None:
        from server.telemetry.drawing import TracedDispatcher  # not without OpenTelemetry

        dispatcher = TracedDispatcher(dispatcher, traces)
    jobs = JobRunner(
        dispatcher=dispatcher, store=_job_store(config), config=config.jobs, metrics=metrics
    )
    return Services(
        config=config,
        dispatcher=dispatcher,
        keys=KeyRing.of(config),
        jobs=jobs,
        metrics=metrics,
        traces=traces,
    )


def _job_store(config: ServeConfig) -> JobStore:
    bounds = Bounds.of(config.jobs)
    if config.redis.url is None:
        return MemoryJobStore(bounds, now_s=time.time)
    from server.jobs.redis import RedisJobStore  # whoever has no Redis need not import its client

    return RedisJobStore(
        config.redis.url,
        bounds,
        timeout_s=config.redis.timeout_s,
        now_s=time.time,
        tls=config.redis.tls,
    )
