"""The error table: every error to its HTTP status, in the shape that OpenAI's clients know.

``{"error": {"type": …, "code": …, "message": …, "param": …}}``. Messages never contain a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine import errors as engine_errors
from engine.errors import DarkroomError, OverloadedError


class ServerError(DarkroomError):
    """Base of what the server refuses or fails; ``field`` names the parameter to blame, if any."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(ServerError):
    """No such job, picture, model or path (for this tenant)."""


class ConflictError(ServerError):
    """The idempotency key was used with another body, or the name is taken."""


class UnauthenticatedError(ServerError):
    """No API key, or one that is not known."""


class ForbiddenError(ServerError):
    """The key is known, but may not do this."""


class RateLimitedError(ServerError):
    """A per-key or per-tenant rate is used up; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PayloadTooLargeError(ServerError):
    """The body or an upload is larger than the configured bound."""


class TooSlowError(ServerError):
    """The head or the body of the request arrived more slowly than the configured bound."""


class JobsUnavailableError(ServerError):
    """The store of jobs does not answer; try again."""


class CacheUnavailableError(ServerError):
    """The noise cache's Redis does not answer an operator; pictures are drawn all the same."""


Bound = Literal["queue", "tenant", "requests", "wait", "deadline"]
"""What a request may not pass: steps that wait in all, or of its tenant; requests that wait; the
seconds before it begins; and its own deadline."""


class NoRoomError(OverloadedError):
    """Admission refuses a request that it would take ``retry_after_s`` seconds from now.

    ``bound`` is the one that the request would pass.
    """

    def __init__(self, message: str, *, bound: Bound, retry_after_s: float | None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.bound: Bound = bound


class DeadlineTooShortError(ServerError):
    """Even alone, the picture would take longer than its deadline leaves. Refused at once.

    Waiting does not change that: another deadline or fewer steps do. ``retry_after_s`` is when all
    the work that is there now will be done, so that a client which retries whatever is refused does
    so where its picture has the whole application, and not in the middle of a queue.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, field="deadline_s")
        self.retry_after_s = retry_after_s


class UnprocessableError(ServerError):
    """Well-formed, but not servable."""


class ContentRefusedError(ServerError):
    """The operator's content check refused to release the picture or to draw the prompt."""


class StartError(ServerError):
    """The application did not come up. Nobody asks over HTTP then: the command line says it."""


class WorkerLostError(ServerError):
    """A worker died with the task, and the retry failed too."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    status: int
    type: str
    code: str


# The first class that matches wins: subclasses before their base.
TABLE: tuple[tuple[type[Exception], Row], ...] = (
    (engine_errors.LimitExceededError, Row(400, "invalid_request_error", "limit_exceeded")),
    (engine_errors.InvalidRequestError, Row(400, "invalid_request_error", "invalid_value")),
    (engine_errors.UnsupportedError, Row(422, "invalid_request_error", "unsupported")),
    (engine_errors.CancelledError, Row(499, "cancelled", "cancelled")),
    (engine_errors.DeadlineExceededError, Row(504, "deadline_exceeded", "deadline_exceeded")),
    (engine_errors.OverloadedError, Row(429, "overloaded", "overloaded")),
    (engine_errors.ClosedError, Row(503, "unavailable", "draining")),
    (engine_errors.ExecutionError, Row(500, "server_error", "execution_failed")),
    (engine_errors.BackendUnavailableError, Row(503, "unavailable", "backend_unavailable")),
    (
        engine_errors.CheckpointError,
        Row(422, "invalid_request_error", "unusable_checkpoint"),
    ),
    (engine_errors.PlanError, Row(500, "server_error", "plan_failed")),
    (UnauthenticatedError, Row(401, "authentication_error", "invalid_api_key")),
    (ForbiddenError, Row(403, "permission_error", "forbidden")),
    (ContentRefusedError, Row(403, "content_refused", "content_refused")),
    (NotFoundError, Row(404, "not_found_error", "not_found")),
    (ConflictError, Row(409, "conflict_error", "conflict")),
    (PayloadTooLargeError, Row(413, "invalid_request_error", "payload_too_large")),
    (TooSlowError, Row(408, "invalid_request_error", "too_slow")),
    (JobsUnavailableError, Row(503, "unavailable", "jobs_unavailable")),
    (CacheUnavailableError, Row(503, "unavailable", "cache_unavailable")),
    (UnprocessableError, Row(422, "invalid_request_error", "unprocessable")),
    (DeadlineTooShortError, Row(429, "invalid_request_error", "deadline_too_short")),
    (RateLimitedError, Row(429, "rate_limit_error", "rate_limited")),
    (WorkerLostError, Row(503, "unavailable", "worker_lost")),
)
INTERNAL = Row(500, "server_error", "internal_error")


def row_of(error: BaseException) -> Row:
    """The table's row for ``error``; an error that nobody planned is an internal one."""
    for kind, row in TABLE:
        if isinstance(error, kind):
            return row
    return INTERNAL


def refusal_reason(error: BaseException) -> str:
    """Why admission refused, as metrics count it: the bound, or else the error's code."""
    return error.bound if isinstance(error, NoRoomError) else row_of(error).code


def body_of(error: BaseException) -> dict[str, Any]:
    """The JSON body. An unplanned error's own text stays inside: it may hold anything."""
    row = row_of(error)
    planned = row is not INTERNAL
    return {
        "error": {
            "type": row.type,
            "code": row.code,
            "message": str(error) if planned else "the server failed; its log says why",
            "param": getattr(error, "field", None),
        }
    }


def retry_after_s(error: BaseException) -> int | None:
    """Whole seconds for a ``Retry-After`` header, at least 1; None where it does not apply."""
    row = row_of(error)
    wait_s = getattr(error, "retry_after_s", None)
    if wait_s is None:
        return 1 if row.status in (429, 503) else None
    return max(1, int(-(-wait_s // 1)))
