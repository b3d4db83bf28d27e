"""``/docs``: the OpenAPI document as one plain page, rendered here: no script, no CDN."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from server.services import Services

_METHODS = ("get", "post", "put", "patch", "delete")
_MAX_DEPTH = 4
Schema = Mapping[str, Any]


def routes(_services: Services) -> APIRouter:
    """The page and its style sheet; they describe, and hold nothing secret."""
    router = APIRouter(include_in_schema=False)
    style = resources.files("server").joinpath("docs.css").read_bytes()

    @cache
    def page(app: Any) -> str:
        return render(app.openapi())

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(request.app))

    @router.get("/docs/style.css")
    async def css() -> Response:
        return Response(style, media_type="text/css", headers={"cache-control": "no-cache"})

    return router


def render(document: Schema) -> str:
    """An OpenAPI document as a page of HTML."""
    info = document["info"]
    body = "".join(_tag(document, tag) for tag in document.get("tags", ()))
    contents = "".join(
        f'<li><a href="#{escape(tag["name"])}">{escape(tag["name"])}</a>'
        f" {escape(tag['description'])}</li>"
        for tag in document.get("tags", ())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title>"
        '<link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/docs/style.css"></head><body><main>'
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"<p>{escape(info.get('summary', ''))}"
        ' The same for machines: <a href="/openapi.json">openapi.json</a>.</p>'
        f"{_prose(info.get('description', ''))}"
        f"<nav><ul>{contents}</ul></nav>{body}</main></body></html>"
    )


def _tag(document: Schema, tag: Schema) -> str:
    operations = "".join(
        _operation(document, method, path, item[method])
        for path, item in document["paths"].items()
        for method in _METHODS
        if method in item and tag["name"] in item[method].get("tags", ())
    )
    name = escape(tag["name"])
    return f'<h2 id="{name}">{name}</h2><p>{escape(tag["description"])}</p>{operations}'


def _operation(document: Schema, method: str, path: str, operation: Schema) -> str:
    parts = [_prose(operation.get("description", ""))]
    if parameters := operation.get("parameters"):
        parts.append(f"<h3>Parameters</h3>{_parameters(document, parameters)}")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, content["schema"])
        parts.append(f"<h3>Body <code>{escape(kind)}</code></h3>")
        parts.append(_example(schema, content) + _fields(document, schema, _MAX_DEPTH))
    parts.append(f"<h3>Replies</h3>{_replies(document, operation['responses'])}")
    return (
        f'<details id="{escape(operation["operationId"])}"><summary>'
        f'<span class="method {method}">{method.upper()}</span> <code>{escape(path)}</code>'
        f" {escape(operation.get('summary', ''))}</summary>{''.join(parts)}</details>"
    )


def _parameters(document: Schema, parameters: list[Schema]) -> str:
    rows = [
        _row(
            document,
            item["name"],
            {**item["schema"], "description": item.get("description", "")},
            required=item.get("required", False),
            where=item["in"],
        )
        for item in parameters
    ]
    return _table(rows)


def _replies(document: Schema, replies: Schema) -> str:
    rows = []
    for status, reply in sorted(replies.items()):
        kinds = ", ".join(reply.get("content", {}))
        rows.append(
            f"<tr><th scope=row>{escape(status)}</th><td>{_inline(reply['description'])}</td>"
            f"<td><code>{escape(kinds)}</code></td></tr>"
        )
    shown = ""
    for kind, content in replies.get("200", {}).get("content", {}).items():
        schema = _resolved(document, content.get("schema", {}))
        if "properties" in schema:
            inner = _fields(document, schema, _MAX_DEPTH)
            shown += f"<details><summary>200 <code>{escape(kind)}</code></summary>{inner}</details>"
    return f"<table><tbody>{''.join(rows)}</tbody></table>{shown}"


def _fields(document: Schema, schema: Schema, depth: int) -> str:
    required = schema.get("required", ())
    rows: list[str] = []
    for name, field in schema.get("properties", {}).items():
        rows.append(_row(document, name, field, required=name in required))
        if depth:
            rows += [
                f"<tr><td></td><td colspan=2>{_fields(document, inner, depth - 1)}</td></tr>"
                for inner in _inner(document, field)
            ]
    return _table(rows)


def _row(document: Schema, name: str, field: Schema, *, required: bool, where: str = "") -> str:
    marks = " <em>required</em>" if required else ""
    default = field.get("default")
    tail = f" Default <code>{escape(json.dumps(default))}</code>." if default is not None else ""
    return (
        f"<tr><th scope=row><code>{escape(name)}</code>{marks} {escape(where)}</th>"
        f"<td>{escape(_type(document, field))}</td>"
        f"<td>{_inline(field.get('description', ''))}{tail}</td></tr>"
    )


def _table(rows: list[str]) -> str:
    return f"<table><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _type(document: Schema, field: Schema) -> str:
    """A type in words: ``integer 1 … 10``, ``"b64_json" or "url"``, ``list of number``."""
    choices = [_type(document, kind) for kind in field.get("anyOf", ())]
    if choices:
        return " or ".join(choice for choice in choices if choice != "null")
    if "$ref" in field:
        target = _resolved(document, field)
        return _type(document, target) if "enum" in target else str(target.get("title", "object"))
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if "const" in field:
        return json.dumps(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(document, field.get('items', {}))}"
    return " ".join([str(field.get("type", "any")), *_bounds(field)])


def _bounds(field: Schema) -> Iterator[str]:
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    if low is not None or high is not None:
        # FastAPI writes the bounds of whole numbers as fractions.
        yield " … ".join("" if bound is None else f"{bound:.15g}" for bound in (low, high)).strip()
    if "maxLength" in field:
        yield f"up to {field['maxLength']} characters"


def _inner(document: Schema, field: Schema) -> Iterator[Schema]:
    """Objects inside a field, whose own fields are worth showing."""
    for kind in (field, field.get("items", {}), *field.get("anyOf", ())):
        found = _resolved(document, kind) if "$ref" in kind else kind
        if "properties" in found:
            yield found


def _resolved(document: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    found: Any = document
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def _example(schema: Schema, content: Schema) -> str:
    named = [example["value"] for example in content.get("examples", {}).values()]
    shown = [*named, *schema.get("examples", ())]
    return "".join(f"<pre>{escape(json.dumps(item, indent=2))}</pre>" for item in shown)


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n") if part.strip())


def _inline(text: str) -> str:
    """Escaped, with `code` between backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
