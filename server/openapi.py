"""What FastAPI cannot derive for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.schemas.openai import EditFields

TAGS = [
    {"name": "images", "description": "OpenAI's Images interface: one request, its pictures."},
    {"name": "jobs", "description": "Pictures in the background, with events and webhooks."},
    {"name": "models", "description": "What can be asked for."},
    {"name": "sdapi", "description": "The interface of Automatic1111's web UI."},
    {"name": "operation", "description": "For whoever runs the server."},
    {"name": "health", "description": "For orchestrators and load balancers."},
]

_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}


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
