"""The span of one picture, and one for each of its phases."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import StatusCode

from server.errors import row_of
from server.messages import Drawn, Failed, PictureEvent, PictureTask, Queued, Started, Tick
from server.metrics import phases
from server.telemetry.attributes import named, of_picture, of_request
from server.telemetry.traces import MAX_EVENTS, Traces

_NS = 1_000_000_000


class PictureSpan:
    """From admission to the finished picture, as its events tell it.

    A phase's span is as long as the worker measured the phase. They are laid end to end around the
    moment at which the worker said that the first step begins, so that clocks of two machines are
    never compared; what the picture's span has beyond them is the way to the worker and back.

    Attributes:
        open: whether it has neither ended nor failed.
        outcome: ``ok``, or the code of the error that ended it.
    """

    def __init__(
        self, task: PictureTask, traces: Traces, parent: Context, *, began_ns: int
    ) -> None:
        self.open = True
        self.outcome = "ok"
        self._traces = traces
        self._began_ns = began_ns
        self._started_ns: int | None = None
        self._span = traces.tracer.start_span(
            "picture",
            context=parent,
            start_time=began_ns,
            attributes=of_request(task) | named(index=task.index),
        )

    def heard(self, event: PictureEvent) -> None:
        """Note what the dispatcher says of this picture."""
        if not self.open:
            return
        now_ns = self._traces.now_ns()
        match event:
            case Queued():
                place = named(position=event.position, steps_ahead=event.steps_ahead)
                self._span.add_event("queued", place, now_ns)
            case Started():
                # The last one counts: a second is a worker that goes on for one that died.
                self._started_ns = now_ns
                name = "started" if event.attempt == 1 else "failover"
                where = named(worker=event.worker, attempt=event.attempt)
                self._span.add_event(name, where, now_ns)
            case Drawn():
                self._phases(event, now_ns)
                self._span.set_attributes(of_picture(event))
                self._end("ok")
            case Failed():
                self._end(row_of(event.error).code)

    def abandon(self, outcome: str) -> None:
        """End it where it is not ended yet: nobody wants it any more, or all have failed."""
        if self.open:
            self._end("cancelled" if outcome == "ok" else outcome)

    def _end(self, outcome: str) -> None:
        self.open, self.outcome = False, outcome
        self._span.set_attribute("darkroom.outcome", outcome)
        if outcome not in ("ok", "cancelled"):
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._traces.now_ns())

    def _phases(self, drawn: Drawn, now_ns: int) -> None:
        timings = drawn.timings
        before_ns = round((timings.queue_s + timings.encode_s + timings.cache_s) * _NS)
        after_ns = round((timings.denoise_s + timings.decode_s) * _NS)
        # The first step began before we heard of it, and so long before we heard of the last.
        first_ns = now_ns - after_ns
        if self._started_ns is not None:
            first_ns = min(first_ns, self._started_ns)
        at_ns = max(self._began_ns, first_ns - before_ns)
        parent = trace.set_span_in_context(self._span, Context())
        for name, seconds in phases(timings):
            ends_ns = at_ns + round(seconds * _NS)
            if ends_ns > at_ns:  # a phase that was not gone through has no span
                span = self._traces.tracer.start_span(name, context=parent, start_time=at_ns)
                if name == "denoise":
                    _tell(span, drawn.ticks, at_ns, ends_ns)
                span.end(ends_ns)
            at_ns = ends_ns


def _tell(span: trace.Span, ticks: tuple[Tick, ...], began_ns: int, ended_ns: int) -> None:
    """The steps as events: of more than a span may hold, every so manieth and the last.

    A tick's end is noted a moment after the phase's own, which it never passes here.
    """
    every = max(1, -(-len(ticks) // MAX_EVENTS))
    for tick in ticks[(len(ticks) - 1) % every :: every]:
        said = named(step=tick.step, batch_rows=tick.rows, tick_ms=round(tick.tick_s * 1e3, 3))
        span.add_event("tick", said, min(began_ns + round(tick.ended_s * _NS), ended_ns))
