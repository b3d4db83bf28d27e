"""Every error as a reply of one shape, those of FastAPI and Starlette included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from engine.errors import DarkroomError, InvalidRequestError
from server.errors import Row, body_of, retry_after_s, row_of
from server.request_log import record_of

_MAX_PARAM_CHARS = 100

# What the frameworks raise themselves, by status.
_FRAMEWORK: dict[int, tuple[Row, str]] = {
    400: (Row(400, "invalid_request_error", "malformed_body"), "the body cannot be read"),
    404: (Row(404, "not_found_error", "not_found"), "there is no such path"),
    405: (
        Row(405, "invalid_request_error", "method_not_allowed"),
        "this path does not take that method",
    ),
    413: (
        Row(413, "invalid_request_error", "payload_too_large"),
        "the body is larger than the configured bound",
    ),
    415: (
        Row(415, "invalid_request_error", "unsupported_media_type"),
        "this path does not take that media type",
    ),
}


def install(app: FastAPI) -> None:
    """Answer every error that a route, FastAPI or Starlette raises in our shape."""
    app.add_exception_handler(DarkroomError, _planned)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)


def reply_of(error: BaseException) -> JSONResponse:
    """The reply to any error; an unplanned one says nothing but that."""
    wait_s = retry_after_s(error)
    headers = {} if wait_s is None else {"retry-after": str(wait_s)}
    row = row_of(error)
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error), row.status, headers)


def error_of(error: RequestValidationError) -> InvalidRequestError:
    """The first thing that validation found wrong, as an error of ours."""
    found = error.errors()
    return invalid(found[0], others=len(found) - 1)


def invalid(found: Mapping[str, Any], *, others: int = 0) -> InvalidRequestError:
    """One of Pydantic's findings, as an error of ours; it names the field, never the value."""
    where = [part for part in found["loc"] if part not in ("body", "query", "path", "header")]
    if found["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {found['ctx']['error']}", field="body")
    param = _printable(where) or "body"
    if found["type"] == "extra_forbidden":
        said = f"unknown field {param}"
    else:
        said = f"{param}: {found['msg']}"
    more = f" (and {others} more)" if others else ""
    return InvalidRequestError(said + more, field=param)


async def _planned(request: Request, error: Exception) -> JSONResponse:
    record_of(request.scope).failed(row_of(error).code)
    return reply_of(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _planned(request, error_of(error))


async def _framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    fallback = Row(error.status_code, "invalid_request_error", "refused"), "refused"
    row, message = _FRAMEWORK.get(error.status_code, fallback)
    record_of(request.scope).failed(row.code)
    body = {"type": row.type, "code": row.code, "message": message, "param": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)


def _printable(where: Sequence[object]) -> str:
    """Dotted path of a field, bounded, and without what UTF-8 cannot hold."""
    text = ".".join(str(part) for part in where)[:_MAX_PARAM_CHARS]
    return text.encode("utf-8", "replace").decode()
