"""The OpenAPI document and the page that shows it; words that must be the engine's."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from engine.solvers import SCHEDULES, SOLVERS
from server.api.docs import render
from server.errors import INTERNAL, TABLE
from server.gateway import create_app
from server.schemas.base import MEANING, ScheduleName, SolverName
from server.schemas.jobs import JobBody
from server.schemas.openai import GenerationBody
from server.schemas.sdapi import Txt2ImgBody
from tests.unit.server.scripted import services_of


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(services_of())) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> Any:
    return client.get("/openapi.json").json()


def operations(document: Any) -> list[tuple[str, Any]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def test_solvers_and_schedules_are_the_engines() -> None:
    assert get_args(SolverName) == tuple(SOLVERS)
    assert set(get_args(ScheduleName)) == set(SCHEDULES) - {"custom"}


def test_every_status_of_the_error_table_has_a_meaning() -> None:
    assert {row.status for _, row in TABLE} | {INTERNAL.status} <= set(MEANING)


def test_every_operation_is_described(document: Any) -> None:
    names = [operation["operationId"] for _, operation in operations(document)]
    assert len(names) == len(set(names))
    for label, operation in operations(document):
        assert operation["summary"], label
        assert operation["description"], label
        assert operation["tags"][0] in {tag["name"] for tag in document["tags"]}, label


def test_errors_have_one_shape_in_the_document_too(document: Any) -> None:
    assert "HTTPValidationError" not in str(document)
    ours = {"$ref": "#/components/schemas/ErrorReply"}
    for label, operation in operations(document):
        for status, reply in operation["responses"].items():
            if int(status) >= 400 and (label, status) != ("GET /readyz", "503"):
                assert reply["content"]["application/json"]["schema"] == ours, (label, status)


def test_only_what_needs_no_key_is_open(document: Any) -> None:
    open_ = {label for label, operation in operations(document) if "security" not in operation}
    assert open_ == {"GET /healthz", "GET /readyz", "GET /v1/files/{id}/{name}"}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (GenerationBody, "/v1/images/generations"),
        (Txt2ImgBody, "/sdapi/v1/txt2img"),
        (JobBody, "/v1/jobs"),
    ],
)
def test_examples_are_requests_that_work(
    client: TestClient, document: Any, body: type[BaseModel], path: str
) -> None:
    examples = document["components"]["schemas"][body.__name__]["examples"]
    assert examples
    for example in examples:
        assert client.post(path, json=example).status_code in (200, 202)


# -------------------------------------------------------------------------------------- the page


def test_the_page_shows_every_operation_and_needs_nobody_else(
    client: TestClient, document: Any
) -> None:
    reply = client.get("/docs")
    page = html.unescape(reply.text)
    for label, operation in operations(document):
        method, path = label.split()
        assert f">{method}</span> <code>{path}</code> {operation['summary']}" in page
    assert "partial_images" in page
    assert "<script" not in page
    assert "integer 1 … 128" in page
    links = re.findall(r'(?:href|src)="([^"#:]+)"', reply.text)
    assert "//" not in reply.text.replace(document["info"]["description"], "")
    assert set(links) == {"/docs/style.css", "/openapi.json"}
    for link in links:
        assert client.get(link).status_code == 200
    anchors = set(re.findall(r'href="#([^"]+)"', reply.text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', reply.text))


def test_what_the_document_says_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = render(
        {
            "info": {"title": evil, "version": evil, "summary": evil, "description": evil},
            "tags": [{"name": "t", "description": evil}],
            "paths": {
                f"/{evil}": {
                    "get": {
                        "tags": ["t"],
                        "operationId": "o",
                        "summary": evil,
                        "description": f"`{evil}`",
                        "parameters": [
                            {"name": evil, "in": "query", "schema": {"enum": [evil]}},
                        ],
                        "responses": {"200": {"description": evil, "content": {evil: {}}}},
                    }
                }
            },
            "components": {"schemas": {}},
        }
    )
    assert "<script" not in page
    assert page.count("&lt;script") >= 9
