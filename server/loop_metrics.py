"""How much an event loop has to do, for whoever looks for tasks that never end."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Gauge


def watch_loop(registry: CollectorRegistry) -> None:
    """Count the tasks of the loop in which the metrics are read; none outside of one."""
    Gauge(
        "darkroom_event_loop_tasks", "Tasks of this process's event loop.", registry=registry
    ).set_function(_tasks)


def _tasks() -> float:
    try:
        return float(len(asyncio.all_tasks()))
    except RuntimeError:
        return 0.0
