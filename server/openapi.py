"""What FastAPI cannot derive for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.schemas.base import MEANING
from server.schemas.openai import EditFields

DESCRIPTION = """\
Every error has one shape, `{"error": {"type", "code", "message", "param"}}`, and every reply an
`X-Request-Id`: your own where you send one of up to 64 letters, digits, `.`, `_`, `:` or `-`.

Where keys are configured, send yours as `Authorization: Bearer <key>` or `X-Api-Key: <key>`.

A minor release may add routes, fields that may be left out, fields of replies, events, error codes
and configuration keys with a default. It does not remove or rename any of these, change what one
means, or refuse what was taken before; that takes a major release, and a release with a warning
before it.
"""
TAGS = [
    {"name": "images", "description": "OpenAI's Images interface: one request, its pictures."},
    {"name": "jobs", "description": "Pictures in the background, with events and webhooks."},
    {"name": "models", "description": "What can be asked for."},
    {"name": "sdapi", "description": "The interface of Automatic1111's web UI."},
    {"name": "operation", "description": "For whoever runs the server."},
    {"name": "health", "description": "For orchestrators and load balancers."},
]

_METHODS = ("get", "post", "put", "patch", "delete")
# The layers around the routes may give these on every path.
_LAYERS = (400, 408, 413, 429, 500)
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}


def operation_id(route: APIRoute) -> str:
    """A short name for generated clients: that of the function behind the route."""
    return route.name.replace("-", "_")


class DescribedApp(FastAPI):
    """An application whose document also says what the layers around its routes do."""

    def openapi(self) -> dict[str, Any]:
        """The document, made when it is first asked for."""
        if self.openapi_schema is None:
            self.openapi_schema = _described(super().openapi())
        return self.openapi_schema


def _described(document: dict[str, Any]) -> dict[str, Any]:
    components = document["components"]
    for path in document["paths"].values():
        for operation in (path[method] for method in _METHODS if method in path):
            _complete(operation["responses"])
            if "401" in operation["responses"]:
                operation["security"] = [{name: []} for name in _SECURITY]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["securitySchemes"] = _SECURITY
    return document


def _complete(replies: dict[str, Any]) -> None:
    # FastAPI takes for granted that validation answers 422 in its own shape.
    if "HTTPValidationError" in str(replies.get("422")):
        del replies["422"]
    schema = {"schema": {"$ref": "#/components/schemas/ErrorReply"}}
    for status in _LAYERS:
        reply = {"description": MEANING[status], "content": {"application/json": schema}}
        replies.setdefault(str(status), reply)


def edit_form() -> dict[str, Any]:
    """The request body of ``/v1/images/edits``: a form of plain values and files."""
    schema = EditFields.model_json_schema()
    fields = {name: _plain(name, field) for name, field in schema["properties"].items()}
    files = {
        "image": {**_FILE, "description": "PNG, JPEG or WebP; clients may call it `image[]`."},
        "mask": {**_FILE, "description": "Repaints where transparent, else where white."},
    }
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "title": "EditForm",
                    "properties": {**files, **fields},
                    "required": ["image", "prompt"],
                    "additionalProperties": False,
                },
                "encoding": {"image": {"contentType": "image/png, image/jpeg, image/webp"}},
            }
        },
    }


def _plain(name: str, field: dict[str, Any]) -> dict[str, Any]:
    """A field as forms write it: never null, and JSON where it is more than one value."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    own = {key: field[key] for key in ("description", "examples") if key in field}
    if len(kinds) != 1 or "$ref" in kinds[0] or kinds[0].get("type") == "array":
        text = f"JSON. {own.get('description', '')}"
        return {"type": "string", "contentMediaType": "application/json", "description": text}
    return {**kinds[0], **own, "title": name}
