"""What the HTTP interfaces share. Built once by whoever starts a gateway, and injected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.auth import KeyRing
    from server.config import ServeConfig
    from server.dispatch import Dispatcher
    from server.jobs.runner import JobRunner
    from server.metrics import GatewayMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that a route may use."""

    config: ServeConfig
    dispatcher: Dispatcher
    keys: KeyRing
    jobs: JobRunner
    metrics: GatewayMetrics
