"""The OpenAPI document holds: requests made up from it meet no server error and no reply that it
does not describe. Valid ones by its schemas, and ones with something wrong in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.auth import new_key
from server.config import AuthConfig, LimitsConfig, ModelConfig, ServeConfig, TenantConfig
from server.gateway import create_app
from tests.unit.server.scripted import ScriptedDispatcher, services_of

if TYPE_CHECKING:
    from schemathesis import Case

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
KEY = new_key()
# Small, so that what is drawn is drawn quickly.
LIMITS = LimitsConfig(max_pictures=2, max_steps=3, max_side_px=64, max_input_px=256 * 256)
OPEN = ServeConfig(limits=LIMITS)
LOCKED = ServeConfig(
    models=(ModelConfig(id="tintype"),),
    limits=LIMITS,
    auth=AuthConfig(tenants=(TenantConfig(id="shop", key_hashes=(KEY.hash,)),)),
)


def explore(
    schema: Any, mode: GenerationMode, *, examples: int, headers: dict[str, str] | None = None
) -> Iterator[str]:
    """Make up ``examples`` requests of every operation; yields the name of each when it is done."""
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        takes_something = operation.body or any(operation.iter_parameters())
        if mode is GenerationMode.NEGATIVE and not takes_something:
            continue  # there is nothing to get wrong

        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def requests_hold(case: Case[Any]) -> None:
            case.validate_response(case.call(headers=headers), checks=CHECKS)

        requests_hold()
        yield operation.label


def schema_of(dispatcher: ScriptedDispatcher, config: ServeConfig) -> Any:
    app = create_app(services_of(dispatcher, config))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_made_up_requests_meet_documented_replies_only(mode: GenerationMode) -> None:
    seen = list(explore(schema_of(ScriptedDispatcher(), OPEN), mode, examples=5))
    assert {"POST /v1/images/generations", "POST /sdapi/v1/img2img", "GET /metrics"} <= set(seen)


@pytest.mark.parametrize("key", ["", KEY.key], ids=["without", "with"])
def test_with_keys_too(key: str) -> None:
    schema = schema_of(ScriptedDispatcher(), LOCKED)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert list(explore(schema, GenerationMode.POSITIVE, examples=2, headers=headers))
