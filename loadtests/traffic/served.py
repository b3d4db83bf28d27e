"""A Darkroom that a load test starts for itself, and what it says of it at the top of a report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from loadtests.server_processes import RunningServer, free_port, serving
from server.config import ServeConfig
from server.settings import Settings, served_config


@contextlib.contextmanager
def darkroom(config: Path | None = None) -> Iterator[RunningServer]:
    """``darkroom serve`` on a free port of loopback while the block runs.

    Args:
        config: of the server; without one, the defaults.

    Raises:
        RuntimeError: it did not get ready; the message has its last output.
    """
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", str(port)]
    if config is not None:
        command += ["--config", str(config)]
    url = f"http://127.0.0.1:{port}"
    with serving(command, url, ready="/readyz", environment={"HF_HUB_OFFLINE": "1"}) as server:
        yield server


def describe_config(config: Path | None = None) -> str:
    """What of a configuration decides how quick it is, in one line; no keys, no addresses."""
    return _described(served_config(config))


def _described(config: ServeConfig) -> str:
    models = ", ".join(f"{model.id} ({model.backend} {model.precision})" for model in config.models)
    workers = config.workers
    threads = workers.threads_of(Settings.from_environment().threads)
    scaling = f" to {workers.max_replicas}" if workers.max_replicas else ""
    store = "Redis" if config.redis.url else "memory"
    cache = f"{config.cache.default} by default" if config.cache.enabled else "none"
    return (
        f"{models}; {workers.replicas}{scaling} workers on {workers.device}, {threads} threads"
        f" each; {config.http.gateways} gateways; jobs in {store};"
        f" noise cache: {cache}"
    )
