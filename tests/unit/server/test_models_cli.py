"""``darkroom models`` against a server whose dispatcher follows a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import BackendUnavailableError
from loadtests.server_processes import free_port
from server.auth import new_key
from server.cli import app
from server.config import AuthConfig, HttpConfig, ServeConfig, TenantConfig
from server.errors import ServerError
from server.gateway import create_app
from server.http_server import HttpServer
from tests.unit.server.scripted import ScriptedDispatcher, services_of

KEY = new_key()
runner = CliRunner()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    tenant = TenantConfig(id="ops", key_hashes=(KEY.hash,), operator=True)
    http = HttpConfig(port=free_port())
    config = ServeConfig(http=http, auth=AuthConfig(tenants=(tenant,)))
    started: Future[None] = Future()
    stop = threading.Event()

    async def serve() -> None:
        server = HttpServer(create_app(services_of(ScriptedDispatcher(), config)), http)
        await server.start()
        started.set_result(None)
        await asyncio.to_thread(stop.wait)
        await server.stop(0.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.result(60)
    yield f"http://{http.host}:{http.port}"
    stop.set()
    thread.join(60)


def test_models_are_added_reloaded_and_removed(url: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(f"{KEY.key}\n")
    server = ["--url", url, "--key-file", str(key)]
    added = runner.invoke(app, ["models", "add", str(tmp_path / "sketch"), *server])
    assert added.exit_code == 0, added.output
    assert "serves sketch: sd, fp32 on onnxruntime, plan eeeeeeeeeeee" in added.output
    assert runner.invoke(app, ["models", "reload", "sketch", *server]).exit_code == 0
    removed = runner.invoke(app, ["models", "remove", "sketch", *server])
    assert "no longer serves sketch" in removed.output
    gone = runner.invoke(app, ["models", "remove", "sketch", *server])
    assert isinstance(gone.exception, ServerError)
    assert "no such model" in str(gone.exception)


def test_without_a_key_or_a_server_it_says_so(url: str) -> None:
    refused = runner.invoke(app, ["models", "remove", "sketch", "--url", url])
    assert "an API key is needed" in str(refused.exception)
    nobody = f"http://127.0.0.1:{free_port()}"
    silent = runner.invoke(app, ["models", "remove", "sketch", "--url", nobody])
    assert isinstance(silent.exception, BackendUnavailableError)
