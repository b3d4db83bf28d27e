"""The operator routes of a running server, as commands call them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from engine.errors import BackendUnavailableError, InvalidRequestError
from server.errors import ServerError

LOCAL = "http://127.0.0.1:8000"
_COMPILING_S = 3600.0
Body = TypeVar("Body", bound=BaseModel)

KeyOption = Annotated[
    Path | None, typer.Option(help="A file that holds an operator's key, where keys are needed.")
]


def call(
    method: str,
    url: str,
    path: str,
    key_file: Path | None,
    *,
    body: Mapping[str, str | bool | None] | None = None,
    query: Mapping[str, str | int | bool] | None = None,
) -> dict[str, Any]:
    """One call of an operator route, and the JSON of its reply; {} where that is empty.

    Raises:
        ServerError: the server's own refusal.
        InvalidRequestError: the key's file cannot be read, or holds more than a key.
        BackendUnavailableError: nothing answers there, or something else does.
    """
    import httpx  # a part of a second that no other command should cost

    headers = {}
    if key_file is not None:
        headers["authorization"] = f"Bearer {_key_in(key_file)}"
    try:
        # No proxy of the environment's: the key goes to that server and to nobody else.
        with httpx.Client(trust_env=False, timeout=_COMPILING_S) as client:
            reply = client.request(
                method, url.rstrip("/") + path, json=body, params=query, headers=headers
            )
    except httpx.LocalProtocolError as error:
        # Its kind only: the message quotes what may not be sent, and that may be the key.
        raise BackendUnavailableError(f"{url} cannot be asked: {type(error).__name__}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BackendUnavailableError(f"{url} does not answer: {error}") from None
    try:
        found: dict[str, Any] = reply.json() if reply.content else {}
        if reply.is_error:
            raise ServerError(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        raise BackendUnavailableError(
            f"what answers at {url} is no Darkroom: status {reply.status_code}"
        ) from None
    return found


def reply_as(body: type[Body], told: dict[str, Any], url: str) -> Body:
    """A reply that :func:`call` gave, as what it should be.

    Raises:
        BackendUnavailableError: it is something else: another server's, or another version's.
    """
    try:
        return body.model_validate(told)
    except ValidationError as error:
        raise BackendUnavailableError(
            f"what answers at {url} is no Darkroom, or one of another version: its reply is no"
            f" {body.__name__} ({error.error_count()} fields differ)"
        ) from None


def _key_in(file: Path) -> str:
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"{file} cannot be read as a key: {type(error).__name__}", field="key_file"
        ) from error
    if not (key and key.isascii() and key.isprintable()):  # a line's end is not printable
        raise InvalidRequestError(
            f"{file} must hold an operator's key and nothing else: one line of printable ASCII",
            field="key_file",
        )
    return key
