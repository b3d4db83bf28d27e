"""API keys: what is stored, what is accepted, and whose request it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from engine.errors import InvalidRequestError
from server.auth import (
    ANONYMOUS,
    SCOPE_KEY,
    Caller,
    KeyRing,
    Tenant,
    caller_of,
    new_key,
    operator_of,
    tenant_of,
)
from server.config import AuthConfig, HttpConfig, ServeConfig, TenantConfig
from server.errors import ForbiddenError, UnauthenticatedError

FIRST, SECOND = new_key(), new_key()


def ring(*tenants: TenantConfig) -> KeyRing:
    return KeyRing(AuthConfig(tenants=tenants), enabled=True)


@pytest.fixture
def keys() -> KeyRing:
    return ring(
        TenantConfig(id="atelier", key_hashes=(FIRST.hash,), weight=2.0, max_priority=3),
        TenantConfig(id="house", key_hashes=(SECOND.hash,), operator=True, requests_per_minute=6),
    )


def test_a_key_is_256_random_bits_and_only_its_hash_is_kept() -> None:
    assert re.fullmatch(r"dk-[0-9a-f]{12}-[A-Za-z0-9_-]{43}", FIRST.key)
    assert FIRST.key != SECOND.key
    secret = FIRST.key.split("-", 2)[2]
    assert secret not in FIRST.hash
    assert FIRST.hash.count(".") == 3  # pastes into YAML and shells without quotes


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {FIRST.key}"},
        {"authorization": f"bearer  {FIRST.key} "},
        {"x-api-key": FIRST.key},
        {"authorization": f"Bearer {FIRST.key}", "x-api-key": FIRST.key},
    ],
)
def test_both_headers_name_the_tenant(keys: KeyRing, headers: Mapping[str, str]) -> None:
    caller = keys.identify(headers)
    assert caller.tenant == Tenant(id="atelier", weight=2.0, max_priority=3)
    assert caller.key_id == FIRST.key.split("-")[1]


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "an API key is needed"),
        ({"x-api-key": ""}, "an API key is needed"),
        ({"authorization": "Bearer "}, "an API key is needed"),
        ({"authorization": f"Basic {FIRST.key}"}, "Bearer"),
        ({"authorization": f"Bearer {FIRST.key}", "x-api-key": SECOND.key}, "different keys"),
        ({"x-api-key": new_key().key}, "not known"),
        ({"x-api-key": FIRST.key[:-1]}, "not known"),
        ({"x-api-key": FIRST.key + "A"}, "not known"),
        ({"x-api-key": FIRST.key[:16] + SECOND.key[16:]}, "not known"),
        ({"x-api-key": FIRST.hash}, "not known"),
        ({"x-api-key": "é" * 5000}, "not known"),
    ],
)
def test_anything_else_is_refused_without_showing_it(
    keys: KeyRing, headers: Mapping[str, str], reason: str
) -> None:
    with pytest.raises(UnauthenticatedError, match=reason) as caught:
        keys.identify(headers)
    assert "dk-" not in str(caught.value)


def test_without_authentication_everyone_is_the_anonymous_operator() -> None:
    keys = KeyRing.of(ServeConfig())
    caller = keys.identify({"x-api-key": "whatever"})
    assert (caller.tenant.id, caller.tenant.operator) == (ANONYMOUS, True)
    assert caller.tenant.requests_per_minute is None
    assert keys.tenants() == (caller.tenant,)


def test_an_open_server_that_others_can_reach_has_no_operator() -> None:
    config = ServeConfig(http=HttpConfig(host="0.0.0.0"), auth=AuthConfig(enabled=False))
    tenant = KeyRing.of(config).identify({}).tenant
    assert (tenant.id, tenant.operator, tenant.max_priority) == (ANONYMOUS, False, 0)


@pytest.mark.parametrize(
    ("tenants", "reason"),
    [
        ([TenantConfig(id="a", key_hashes=("plain text key",))], "another form"),
        ([TenantConfig(id="a"), TenantConfig(id="a")], "is taken"),
        ([TenantConfig(id=ANONYMOUS)], "is taken"),
        (
            [
                TenantConfig(id="a", key_hashes=(FIRST.hash,)),
                TenantConfig(id="b", key_hashes=(FIRST.hash,)),
            ],
            "there already",
        ),
    ],
)
def test_a_key_ring_that_cannot_work_is_refused(tenants: list[TenantConfig], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        ring(*tenants)
    assert "plain text key" not in str(caught.value)


def test_the_dependencies_tell_tenants_from_operators() -> None:
    app = FastAPI()

    @app.get("/who")
    def who(tenant: Annotated[Tenant, Depends(tenant_of)]) -> str:
        return tenant.id

    async def door(scope: dict[str, object], receive: object, send: object) -> None:
        scope[SCOPE_KEY] = Caller(Tenant(id="atelier"), "k")
        await app(scope, receive, send)  # type: ignore[arg-type]

    assert TestClient(door).get("/who").json() == "atelier"  # type: ignore[arg-type]


def test_no_door_no_entry() -> None:
    with pytest.raises(UnauthenticatedError):
        caller_of({})
    with pytest.raises(UnauthenticatedError, match="as found"):
        caller_of({SCOPE_KEY: UnauthenticatedError("as found")})


def test_operators_only() -> None:
    from starlette.requests import Request

    scope = {"type": "http", "headers": [], SCOPE_KEY: Caller(Tenant(id="a"), "k")}
    with pytest.raises(ForbiddenError):
        operator_of(Request(scope))
    scope[SCOPE_KEY] = Caller(Tenant(id="a", operator=True), "k")
    assert operator_of(Request(scope)).id == "a"
