"""``darkroom models`` against a server whose dispatcher follows a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import BackendUnavailableError, InvalidRequestError
from loadtests.server_processes import free_port
from server.auth import new_key
from server.cli import app
from server.config import AuthConfig, ServeConfig, TenantConfig
from server.errors import ServerError
from server.operator_client import call
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


@pytest.mark.parametrize(
    "content",
    [f"{KEY.key}\n{KEY.hash}\n", f"{KEY.key}\r{KEY.hash}", f"{KEY.key}\x07x", f"{KEY.key}é", "\n"],
    ids=["two lines", "two old lines", "control character", "not ASCII", "empty"],  # no random key
)
def test_a_key_file_that_holds_anything_else_is_refused_and_not_repeated(
    url: str, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content.encode())
    words = ["models", "remove", "sketch", "--url", url, "--key-file", str(file)]
    refused = runner.invoke(app, words).exception
    assert isinstance(refused, InvalidRequestError)
    assert "one line of printable ASCII" in str(refused)
    assert KEY.key not in str(refused)
    assert KEY.hash not in str(refused)


def test_what_the_client_may_not_send_is_told_by_its_kind(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx quotes a header that it refuses; whatever gets past the file's check stays unsaid."""
    monkeypatch.setattr("server.operator_client._key_in", lambda file: f"{KEY.key}\nmore")
    with pytest.raises(
        BackendUnavailableError, match="cannot be asked: LocalProtocolError"
    ) as told:
        call("GET", url, "/v1/cache", tmp_path)
    assert KEY.key not in str(told.value)


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        (["stats"], {}),
        (["stats"], {"backend": "redis", "secret": "of somebody else"}),
        (["clear", "--all"], {"states": "all"}),
    ],
)
def test_another_servers_reply_about_a_cache_is_no_traceback(
    words: list[str],
    reply: dict[str, str],
    tmp_path: Path,
) -> None:
    config = tmp_path / "darkroom.yaml"
    config.write_text("{}")
    with another_server(reply) as where:
        asked = ["cache", *words, "--config", str(config), "--url", where]
        told = runner.invoke(app, asked).exception
    assert isinstance(told, BackendUnavailableError)
    assert f"what answers at {where}" in str(told)
    assert "somebody else" not in str(told)


@pytest.mark.parametrize("words", [["add", "sketch"], ["reload", "sketch"]])
def test_another_servers_reply_about_a_model_is_no_traceback(words: list[str]) -> None:
    with another_server({"id": "sketch"}) as where:
        told = runner.invoke(app, ["models", *words, "--url", where]).exception
    assert isinstance(told, BackendUnavailableError)
    assert "is no ModelReply (2 fields differ)" in str(told)


@contextmanager
def another_server(reply: dict[str, str]) -> Iterator[str]:
    """Answers whatever it is asked with ``reply``."""
    content = json.dumps(reply).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_DELETE = do_POST = do_GET

        def log_message(self, *about: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
