"""Servers for real clients, on ports of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from loadtests.server_processes import free_port, serving
from tests.serving import settings_for, tiny_config

if TYPE_CHECKING:
    from engine.compile.plan import Plan


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a ``darkroom serve`` with the default model, as a newcomer starts it."""
    port = free_port()
    config = tmp_path_factory.mktemp("served") / "darkroom.yaml"
    config.write_text(yaml.safe_dump({"http": {"port": port}}))
    command = [sys.executable, "-m", "server", "serve", "--config", str(config)]
    with serving(command, f"http://127.0.0.1:{port}", ready="/readyz", environment={}) as server:
        yield server.url


@pytest.fixture(scope="package")
def tiny_server(
    tiny_checkpoint: Callable[[str], Path],
    tiny_plan: Callable[[str], Plan],
    plans: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """URL of the same application around a tiny model, in this process and without Ray."""
    from tests.clients.local import listening

    tiny_plan("text")  # compiled here, where nobody waits for a server to start
    config = tiny_config(tiny_checkpoint("text"), http={"port": free_port()})
    with listening(config, settings_for(plans, tmp_path_factory.mktemp("tiny") / "home")) as url:
        yield url


@pytest.fixture(scope="package")
def locked_server(
    tiny_checkpoint: Callable[[str], Path],
    tiny_plan: Callable[[str], Plan],
    plans: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, str]]:
    """The tiny one's URL where it asks for keys, and a key."""
    from server.auth import new_key
    from tests.clients.local import listening

    tiny_plan("text")
    key = new_key()
    tenants = [{"id": "somebody", "key_hashes": [key.hash]}]
    config = tiny_config(
        tiny_checkpoint("text"), http={"port": free_port()}, auth={"tenants": tenants}
    )
    with listening(config, settings_for(plans, tmp_path_factory.mktemp("locked") / "home")) as url:
        yield url, key.key
