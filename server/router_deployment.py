"""The router as a Ray Serve deployment: always one replica."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from server.config import ServeConfig
from server.log_pipe import log_to
from server.router import Router


class RouterReplica(Router):
    """:class:`Router` in a process of its own; see there."""

    def __init__(self, config: ServeConfig, log: Path | None = None) -> None:
        log_to(log, config.logging)
        super().__init__(config)
        self._name = f"router/{serve.get_replica_context().replica_tag}"
        self.start()

    async def metrics(self) -> tuple[str, bytes]:
        """(this replica, its Prometheus text)."""
        return self._name, self.metrics_text()

    async def check_health(self) -> None:
        """Asked by Serve: a router that no longer sweeps is replaced."""
        if not self.alive:
            raise RuntimeError("the router has stopped ticking")
