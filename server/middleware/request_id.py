"""The outermost layer: names each request, counts it, times it, logs it, and catches what fell."""

from __future__ import annotations

import logging
import time
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_replies import reply_of
from server.exemplars import REQUEST_ID
from server.metrics import GatewayMetrics
from server.request_log import SCOPE_KEY, UNMATCHED, RequestLog, RequestRecord

if TYPE_CHECKING:
    from server.telemetry.requests import RequestSpan
    from server.telemetry.traces import Traces

_log = logging.getLogger(__name__)
_CLIENT_GONE = 499
# What an error is called whose reply was written by a layer that keeps no record.
_CODES = {
    400: "malformed",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "payload_too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
    503: "unavailable",
}


class RequestLayer:
    """Gives every request an ``X-Request-Id`` (the client's own where it is well-formed).

    A request ends here, whatever happens below: an error that nobody handled becomes a 500, with
    its traceback in the log and none of it in the reply.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: GatewayMetrics,
        log: RequestLog,
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._traces = traces
        self._metrics = metrics
        self._request_log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(id=request_id, method=scope["method"])
        scope[SCOPE_KEY] = record
        span = self._begin(scope, record)
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        began_s = time.monotonic()
        try:
            with self._metrics.in_flight.track_inprogress(), span or nullcontext():
                await self._app(scope, receive, named)
        except Exception as error:
            _log.exception("unplanned error", extra={"darkroom_fields": {"request_id": record.id}})
            record.failed("internal_error")
            if status == 0:
                await reply_of(error)(scope, receive, named)
        finally:
            self._end(scope, record, span, status or _CLIENT_GONE, time.monotonic() - began_s)

    def _begin(self, scope: Scope, record: RequestRecord) -> RequestSpan | None:
        if self._traces is None:
            return None
        from server.telemetry.requests import begin_request  # not without OpenTelemetry

        return begin_request(self._traces, scope, record)

    def _end(
        self,
        scope: Scope,
        record: RequestRecord,
        span: RequestSpan | None,
        status: int,
        seconds: float,
    ) -> None:
        if record.outcome is None and status >= 400:
            record.failed(_CODES.get(status, "cancelled" if status == _CLIENT_GONE else "other"))
        route = route_of(scope)
        outcome = record.outcome or "ok"
        if span is not None:
            span.end(record, route=route, status=status)
        self._metrics.ended(
            route=route,
            outcome=outcome,
            status=status,
            seconds=seconds,
            request_id=record.id,
            trace_id=record.trace_id,
        )
        self._request_log.write(record, route=route, status=status, seconds=seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that took the request: a bounded label, unlike its path."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))
