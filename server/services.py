"""What the HTTP interfaces share. Built once by whoever starts a gateway, and injected."""

from __future__ import annotations

import time
from dataclasses import dataclass

from server.auth import KeyRing
from server.config import ServeConfig
from server.dispatch import Dispatcher
from server.jobs.memory import MemoryJobStore
from server.jobs.runner import JobRunner
from server.jobs.store import Bounds, JobStore
from server.metrics import GatewayMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that a route may use. It does not own the dispatcher."""

    config: ServeConfig
    dispatcher: Dispatcher
    keys: KeyRing
    jobs: JobRunner
    metrics: GatewayMetrics

    async def start(self) -> None:
        """Begin the background work; in the event loop that serves, before the first request."""
        await self.jobs.start()

    async def close(self, timeout_s: float) -> None:
        """Finish or hand over jobs. Call it before the dispatcher is closed: jobs draw on it."""
        await self.jobs.close(timeout_s)


def open_services(config: ServeConfig, dispatcher: Dispatcher) -> Services:
    """What ``config`` describes, over ``dispatcher``. Nothing is connected yet.

    Raises:
        InvalidRequestError: keys or Redis are configured wrongly.
    """
    metrics = GatewayMetrics()
    jobs = JobRunner(
        dispatcher=dispatcher, store=_job_store(config), config=config.jobs, metrics=metrics
    )
    return Services(
        config=config,
        dispatcher=dispatcher,
        keys=KeyRing.of(config),
        jobs=jobs,
        metrics=metrics,
    )


def _job_store(config: ServeConfig) -> JobStore:
    bounds = Bounds.of(config.jobs)
    if config.redis.url is None:
        return MemoryJobStore(bounds, now_s=time.time)
    from server.jobs.redis import RedisJobStore  # whoever has no Redis need not import its client

    return RedisJobStore(
        config.redis.url, bounds, timeout_s=config.redis.timeout_s, now_s=time.time
    )
