"""What orchestrators ask: our own health routes, and those of the proxy that Serve would run."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from server.api import health
from server.app import NAME
from server.auth import new_key
from server.config import AuthConfig, ServeConfig, TenantConfig
from server.gateway import create_app
from server.messages import Readiness
from tests.unit.server.scripted import ScriptedDispatcher, services_of

KEY = new_key()
LOCKED = ServeConfig(
    auth=AuthConfig(
        tenants=(TenantConfig(id="shop", key_hashes=(KEY.hash,), requests_per_minute=1),)
    )
)
COLD = Readiness(ready=False, workers=0, missing=("tintype",))
DRAINING = Readiness(ready=False, workers=1, draining=True)


def client_of(ready: Readiness | None = None, config: ServeConfig | None = None) -> TestClient:
    dispatcher = ScriptedDispatcher() if ready is None else ScriptedDispatcher(ready=ready)
    return TestClient(create_app(services_of(dispatcher, config or ServeConfig())))


@pytest.mark.parametrize("ready", [None, COLD], ids=["warm", "cold"])
def test_a_gateway_answers_as_serves_proxy_would(ready: Readiness | None) -> None:
    """Alive is enough: a pod whose worker is still compiling is not to be replaced."""
    client = client_of(ready)
    alive = client.get("/-/healthz")
    assert (alive.status_code, alive.text) == (200, "success")
    assert alive.headers["content-type"].startswith("text/plain")
    assert client.get("/-/routes").json() == {"/": NAME}


def test_the_routes_name_the_application_as_serve_does() -> None:
    assert health.APPLICATION == NAME


def test_a_draining_gateway_is_taken_out_of_service() -> None:
    client = client_of(DRAINING)
    for path in ("/-/healthz", "/-/routes"):
        assert client.get(path).status_code == 503
        assert "success" not in client.get(path).text
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes", "/healthz", "/readyz"])
def test_a_probe_needs_no_key_and_is_never_refused_for_its_rate(path: str) -> None:
    client = client_of(config=LOCKED)
    for headers in ({}, {"x-api-key": KEY.key}, {"x-api-key": "wrong"}):
        assert {client.get(path, headers=headers).status_code for _ in range(4)} == {200}
    # The same key may look once a minute at anything else.
    key = {"x-api-key": KEY.key}
    assert [client.get("/v1/models", headers=key).status_code for _ in range(2)] == [200, 429]


def test_serves_own_paths_are_no_part_of_the_documented_interface() -> None:
    paths = client_of().get("/openapi.json").json()["paths"]
    assert "/healthz" in paths
    assert not [path for path in paths if path.startswith("/-/")]
