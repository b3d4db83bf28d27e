"""What every route has in common: layers, health, metrics, logs, documentation."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.errors import OverloadedError
from server.auth import new_key
from server.config import (
    AuthConfig,
    HttpConfig,
    LoggingConfig,
    ModelConfig,
    ServeConfig,
    TenantConfig,
)
from server.gateway import create_app
from server.messages import Readiness
from server.metrics_page import families_of
from server.request_log import configure_logging
from tests.unit.server.scripted import MODEL, ScriptedDispatcher, services_of

USER, OPERATOR = new_key(), new_key()
LOCKED = ServeConfig(
    models=(ModelConfig(id="tintype", aliases=("gpt-image-1",)),),
    auth=AuthConfig(
        tenants=(
            TenantConfig(id="shop", key_hashes=(USER.hash,), max_priority=2),
            TenantConfig(id="ops", key_hashes=(OPERATOR.hash,), operator=True),
        )
    ),
)


def client_of(
    dispatcher: ScriptedDispatcher | None = None,
    config: ServeConfig | None = None,
    *,
    key: str | None = None,
) -> TestClient:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return TestClient(create_app(services_of(dispatcher, config)), headers=headers)


# --------------------------------------------------------------------------------- the routes


def test_alive_says_nothing_of_models() -> None:
    client = client_of(ScriptedDispatcher(ready=Readiness(ready=False, workers=0)), LOCKED)
    assert client.get("/healthz").json() == {"status": "alive"}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (Readiness(ready=True, workers=2), 200),
        (Readiness(ready=False, workers=1, missing=("tintype",)), 503),
        (Readiness(ready=True, workers=1, draining=True), 503),
    ],
)
def test_ready_once_every_model_is_warm(found: Readiness, status: int) -> None:
    reply = client_of(ScriptedDispatcher(ready=found)).get("/readyz")
    assert reply.status_code == status
    assert reply.json()["missing"] == list(found.missing)
    assert reply.json()["draining"] is found.draining


def test_models_are_listed_and_found_by_alias() -> None:
    client = client_of(config=LOCKED, key=USER.key)
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"], listed["owned_by"]) == ("tintype", "model", "darkroom")
    assert listed["darkroom"]["aliases"] == ["gpt-image-1"]
    assert listed["darkroom"]["scheduler_stand_in"] is None
    assert client.get("/v1/models/gpt-image-1").json() == listed
    missing = client.get("/v1/models/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "model"


def test_a_model_tells_which_solver_stands_in_for_its_own_scheduler() -> None:
    nearest = replace(
        MODEL,
        id="lms",
        scheduler_class="LMSDiscreteScheduler",
        scheduler_stand_in="LMSDiscrete as dpmpp_2m",
        scheduler_note="another linear multistep solver",
    )
    client = client_of(ScriptedDispatcher(added=[nearest]))
    told = client.get("/v1/models/lms").json()["darkroom"]
    assert {name: told[name] for name in told if name.startswith("scheduler_")} == {
        "scheduler_class": "LMSDiscreteScheduler",
        "scheduler_stand_in": "LMSDiscrete as dpmpp_2m",
        "scheduler_note": "another linear multistep solver",
    }


def test_models_come_and_go_while_it_runs() -> None:
    admin = client_of(config=LOCKED, key=OPERATOR.key)
    added = admin.post("/v1/admin/models", json={"id": "sketch", "path": "/models/sketch"})
    assert added.status_code == 200, added.text
    assert (added.json()["id"], added.json()["darkroom"]["default"]) == ("sketch", False)
    body = {"prompt": "x", "model": "sketch"}
    assert admin.post("/v1/images/generations", json=body).status_code == 200
    assert admin.post("/v1/admin/models/gpt-image-1/reload").json()["id"] == "tintype"
    assert admin.delete("/v1/admin/models/sketch").status_code == 204
    assert admin.post("/v1/images/generations", json=body).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "", {"id": "../x"}, 400, "id"),
        ("POST", "", {"id": "gpt-image-1"}, 409, "alias"),
        ("POST", "", {"id": "a", "path": "/broken"}, 422, "model_index.json"),
        ("POST", "/none/reload", None, 404, "no such model"),
        ("DELETE", "/none", None, 404, "no such model"),
        ("DELETE", "/tintype", None, 409, "configuration"),
    ],
)
def test_wrong_changes_of_models_are_named(
    method: str, path: str, body: Any, status: int, said: str
) -> None:
    url = f"/v1/admin/models{path}"
    reply = client_of(config=LOCKED, key=OPERATOR.key).request(method, url, json=body)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"]
    assert client_of(config=LOCKED, key=USER.key).request(method, url, json=body).status_code == 403


# --------------------------------------------------------------------------------- who may what


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/images/generations"), ("GET", "/metrics")],
)
def test_without_a_key_nothing_is_told(method: str, path: str) -> None:
    reply = client_of(config=LOCKED).request(method, path, json={"prompt": "x"})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"


def test_metrics_are_the_operators() -> None:
    assert client_of(config=LOCKED, key=USER.key).get("/metrics").status_code == 403
    assert client_of(config=LOCKED, key=OPERATOR.key).get("/metrics").status_code == 200


def test_without_keys_metrics_are_anybodys_and_nothing_else_of_operators_is() -> None:
    """A container that listens beyond loopback, in a network that is trusted."""
    config = ServeConfig.model_validate({"http": {"host": "0.0.0.0"}, "auth": {"enabled": False}})
    client = client_of(config=config)

    assert client.get("/metrics").status_code == 200
    assert client.put("/v1/admin/log-level", json={"level": "debug"}).status_code == 403


def test_a_priority_above_the_tenants_is_refused() -> None:
    dispatcher = ScriptedDispatcher()
    client = client_of(dispatcher, LOCKED, key=USER.key)
    reply = client.post("/v1/images/generations", json={"prompt": "x", "priority": 3})
    assert (reply.status_code, reply.json()["error"]["param"]) == (403, "priority")
    body = {"prompt": "x", "priority": 2}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert (dispatcher.tasks[0].tenant, dispatcher.tasks[0].request.priority) == ("shop", 2)


# ------------------------------------------------------------------------------------- headers


def test_browsers_are_told_to_trust_little() -> None:
    for path in ("/healthz", "/docs", "/nothing"):
        headers = client_of().get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_other_origins_may_call_only_where_configured() -> None:
    origin = "https://shop.example"
    config = ServeConfig(http=HttpConfig(cors_origins=(origin,)))
    ask = {"origin": origin, "access-control-request-method": "POST"}
    allowed = client_of(config=config).options("/v1/images/generations", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == origin
    other = client_of(config=config).get("/healthz", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


# ------------------------------------------------------------------------------------- metrics


def samples(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def found(page: dict[str, float], name: str, *labels: str) -> float:
    """The sample of ``name`` that has all ``labels``, on this gateway."""
    (value,) = (
        value
        for sample, value in page.items()
        if sample.startswith((f"{name}{{", f"{name} ")) and all(label in sample for label in labels)
    )
    return value


def test_requests_refusals_and_pictures_are_counted() -> None:
    dispatcher = ScriptedDispatcher()
    client = client_of(dispatcher)
    client.post("/v1/images/generations", json={"prompt": "x", "n": 2})
    stream = {"prompt": "x", "stream": True, "partial_images": 1}
    client.post("/v1/images/generations", json=stream)
    client.post("/v1/images/generations", json={"prompt": ""})
    dispatcher.refusal = OverloadedError("full")
    client.post("/v1/images/generations", json={"prompt": "x"})
    client.get("/a/path/that/is/not/there")
    page = samples(client)
    route = 'route="/v1/images/generations"'
    requests = "darkroom_http_requests_total"
    assert found(page, requests, route, 'outcome="ok"') == 2
    assert found(page, requests, route, 'outcome="invalid_value"') == 1
    assert found(page, requests, route, 'outcome="overloaded"') == 1
    assert found(page, requests, 'route="unmatched"', 'outcome="not_found"') == 1
    assert found(page, "darkroom_http_refusals_total", 'reason="overloaded"') == 1
    assert found(page, "darkroom_gateway_pictures_total", 'tenant="anonymous"') == 3
    assert found(page, "darkroom_picture_phase_seconds_sum", 'phase="denoise"') == pytest.approx(
        0.9
    )
    assert found(page, "darkroom_first_preview_seconds_count") == 1


def test_pages_are_joined_under_one_heading_each_and_absentees_marked() -> None:
    page = b"# HELP darkroom_ticks_total Ticks.\n# TYPE darkroom_ticks_total counter\n"
    dispatcher = ScriptedDispatcher(
        pages=[
            ("worker-0", page + b'darkroom_ticks_total{model="a\\"b"} 3\n'),
            ("worker-1", page + b'darkroom_ticks_total{model="c"} 4\n'),
        ]
    )
    client = client_of(dispatcher)
    first = client.get("/metrics").text
    assert first.count("# TYPE darkroom_ticks_total counter") == 1
    assert 'darkroom_ticks_total{model="a\\"b",replica="worker-0"} 3.0' in first
    assert 'darkroom_ticks_total{model="c",replica="worker-1"} 4.0' in first
    dispatcher.pages = dispatcher.pages[:1]
    second = client.get("/metrics").text
    assert 'darkroom_replica_up{replica="worker-0"} 1.0' in second
    assert 'darkroom_replica_up{replica="worker-1"} 0.0' in second


def test_a_scraper_that_accepts_openmetrics_gets_exemplars() -> None:
    client = client_of(ScriptedDispatcher())
    drawn = client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"x-request-id": "slow-one"}
    )
    assert drawn.status_code == 200

    reply = client.get("/metrics", headers={"accept": "application/openmetrics-text"})

    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    named = {
        family.name
        for family in families_of(reply.content)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"request_id": "slow-one"}
    }
    assert named == {"darkroom_http_request_seconds", "darkroom_picture_phase_seconds"}
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "slow-one" not in plain.text


# ---------------------------------------------------------------------------------------- logs


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Standard error, in effect; what it replaces is put back."""
    roots = [logging.getLogger(name) for name in ("server", "engine", "cache")]
    before = [(root.handlers, root.propagate, root.level) for root in roots]
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    yield stream
    for root, (handlers, propagate, level) in zip(roots, before, strict=True):
        root.handlers, root.propagate = handlers, propagate
        root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_line_a_request_and_no_prompt_in_it(logged: io.StringIO) -> None:
    client = client_of(config=LOCKED, key=USER.key)
    body = {"prompt": "a red umbrella", "user": "Ada Lovelace", "seed": 5}
    client.post("/v1/images/generations", json=body, headers={"x-request-id": "abc"})
    (line,) = lines(logged)
    assert line["event"] == "request"
    assert (line["request_id"], line["tenant"], line["status"]) == ("abc", "shop", 200)
    assert (line["route"], line["seeds"]) == ("/v1/images/generations", [5])
    assert line["timings_ms"]["denoise"] == 300.0
    assert len(line["user"]) == 16
    for secret in ("umbrella", "Ada", USER.key):
        assert secret not in logged.getvalue()


def test_prompts_are_logged_where_that_is_configured(logged: io.StringIO) -> None:
    config = ServeConfig(logging=LoggingConfig(prompts=True))
    client_of(config=config).post("/v1/images/generations", json={"prompt": "a red umbrella"})
    assert lines(logged)[0]["prompt"] == "a red umbrella"


def test_an_unplanned_error_is_logged_with_its_traceback(logged: io.StringIO) -> None:
    client = client_of(ScriptedDispatcher(refusal=RuntimeError("boom")))
    reply = client.post("/v1/images/generations", json={"prompt": "x"})
    assert "boom" not in reply.text
    crash, request = lines(logged)
    assert "boom" in crash["error"]
    assert crash["request_id"] == request["request_id"]
    assert (request["level"], request["outcome"]) == ("error", "internal_error")


def test_the_log_level_is_switched_while_it_runs(logged: io.StringIO) -> None:
    path = "/v1/admin/log-level"
    assert client_of(config=LOCKED, key=USER.key).get(path).status_code == 403
    client = client_of(config=LOCKED, key=OPERATOR.key)
    assert client.get(path).json() == {"level": "info"}
    assert client.put(path, json={"level": "error"}).json() == {"level": "error"}
    written = len(lines(logged))
    client.get("/healthz")
    assert len(lines(logged)) == written
    assert client.put(path, json={"level": "loud"}).status_code == 400
    client.put(path, json={"level": "info"})
    client.get("/healthz")
    assert lines(logged)[-1]["route"] == "/healthz"


def test_text_logs_are_for_people(logged: io.StringIO) -> None:
    configure_logging(LoggingConfig(format="text"), logged)
    client_of().get("/healthz", headers={"x-request-id": "abc"})
    (line,) = logged.getvalue().splitlines()
    assert "info    request request_id=abc" in line
    assert "status=200 outcome=ok" in line
