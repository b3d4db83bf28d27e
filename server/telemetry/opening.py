"""Turns traces on, where the configuration says so. Imports nothing of OpenTelemetry before."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine.errors import BackendUnavailableError
from server.telemetry.config import TelemetryConfig

if TYPE_CHECKING:
    from prometheus_client import Counter

    from server.telemetry.traces import Traces

_EXPORTER = ("opentelemetry", "exporter", "otlp", "proto", "http")


def open_traces(config: TelemetryConfig, spans: Counter) -> Traces | None:
    """The traces that ``config`` asks for; None where it asks for none. Nothing is connected yet.

    Args:
        spans: counts spans by ``outcome``: exported, failed or dropped.

    Raises:
        BackendUnavailableError: they are asked for, and not installed.
    """
    if config.endpoint is None:
        return None
    check_installed(config)
    from server.telemetry.traces import Traces

    return Traces.over_http(config, spans)


def check_installed(config: TelemetryConfig) -> None:
    """Refuse a configuration that asks for traces where nothing can send them.

    Raises:
        BackendUnavailableError: naming what to install.
    """
    if config.endpoint is not None and not _installed():
        raise BackendUnavailableError(
            "telemetry.endpoint is set, and OpenTelemetry's exporter is not installed;"
            " `pip install 'darkroom[otel]'` installs it, and without an endpoint"
            " (OTEL_EXPORTER_OTLP_ENDPOINT sets it too) no traces are sent"
        )


def _installed() -> bool:
    # Level by level: looking for a module imports its parents, and these have nothing in them.
    return all(
        find_spec(".".join(_EXPORTER[:depth])) is not None for depth in range(1, len(_EXPORTER) + 1)
    )
