"""The span of an HTTP request: what the gateway's layer around every request begins and ends."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from opentelemetry import context, trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.request_log import UNMATCHED, RequestRecord
from server.telemetry.traces import Traces

_W3C = TraceContextTextMapPropagator()
_UNTRACED = frozenset({"GET", "HEAD", "OPTIONS"})
"""Looking at things, by scrapers and health checks above all, is not worth a trace."""
_INNOCENT = frozenset({"ok", "cancelled"})


class RequestSpan(AbstractContextManager["RequestSpan"]):
    """The server's span of one request; inside the block, spans that begin are its children.

    A job that the request makes goes on after it, under the same trace.
    """

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def __enter__(self) -> RequestSpan:
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        context.detach(self._token)

    def end(self, record: RequestRecord, *, route: str, status: int) -> None:
        """Note how the request ended; ``status`` is 499 where the client left first.

        What was turned away at the door is not kept: strangers must not be able to crowd out the
        spans of others.
        """
        span, outcome = self._span, record.outcome or "ok"
        if not span.is_recording():
            return
        if route == UNMATCHED:
            record.trace_id = None
            return
        span.update_name(f"{record.method} {route}")
        span.set_attributes(
            {
                "http.route": route,
                "http.response.status_code": status,
                "darkroom.outcome": outcome,
                "darkroom.pictures": record.pictures,
            }
        )
        if record.tenant is not None:
            span.set_attribute("darkroom.tenant", record.tenant)
        if record.model is not None:
            span.set_attribute("darkroom.model", record.model)
        # A stream that failed has said 200 long before.
        if status >= 500 or (status < 400 and outcome not in _INNOCENT):
            span.set_attribute("error.type", outcome)
            span.set_status(StatusCode.ERROR)
        span.end()


def begin_request(traces: Traces, scope: Scope, record: RequestRecord) -> RequestSpan | None:
    """The span of a request that may draw, under the ``traceparent`` that it came with.

    Tells ``record`` the trace's id, where the trace is kept. None for requests that only look.
    """
    if scope["method"] in _UNTRACED:
        return None
    span = traces.tracer.start_span(
        record.method,
        context=_W3C.extract(Headers(scope=scope), context=context.Context()),
        kind=SpanKind.SERVER,
        attributes={
            "http.request.method": record.method,
            "url.scheme": scope["scheme"],
            "darkroom.request_id": record.id,
        },
    )
    if span.is_recording():
        record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    return RequestSpan(span)
