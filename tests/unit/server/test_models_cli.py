"""``darkroom models`` against a server whose dispatcher follows a script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import BackendUnavailableError
from loadtests.server_processes import free_port
from server.auth import new_key
from server.cli import app
from server.config import AuthConfig, ServeConfig, TenantConfig
from server.errors import ServerError
from tests.unit.server.scripted import ScriptedDispatcher
from tests.unit.server.served import served

KEY = new_key()
runner = CliRunner()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    tenant = TenantConfig(id="ops", key_hashes=(KEY.hash,), operator=True)
    with served(ScriptedDispatcher(), ServeConfig(auth=AuthConfig(tenants=(tenant,)))) as listening:
        yield listening


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
