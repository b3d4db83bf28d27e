"""A dispatcher that traces what another one draws."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from opentelemetry import context, trace
from opentelemetry.trace import Span, StatusCode

from server.dispatch import Dispatcher
from server.errors import row_of
from server.messages import (
    CacheAnswer,
    CacheOrder,
    Load,
    ModelChange,
    ModelInfo,
    PictureEvent,
    PictureTask,
    Readiness,
)
from server.request_log import Level
from server.telemetry.attributes import named, of_request
from server.telemetry.pictures import PictureSpan
from server.telemetry.traces import Traces


class TracedDispatcher:
    """Implements :class:`server.dispatch.Dispatcher` over another one, and changes no event.

    The spans of a draw belong to the request in whose context :meth:`draw` is called; those of a
    job that another gateway began are a trace of their own.
    """

    def __init__(self, inner: Dispatcher, traces: Traces) -> None:
        self._inner = inner
        self._traces = traces

    def draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        """Draw the pictures of one request; see :meth:`Dispatcher.draw`."""
        span = self._traces.tracer.start_span(
            "draw",
            context=context.get_current(),
            start_time=self._traces.now_ns(),
            attributes=of_request(tasks[0]) | named(pictures=len(tasks)),
        )
        if not span.is_recording():
            return self._inner.draw(tasks)
        return self._traced(span, [replace(task, traced=True) for task in tasks])

    async def _traced(
        self, span: Span, tasks: Sequence[PictureTask]
    ) -> AsyncGenerator[PictureEvent, None]:
        began_ns = self._traces.now_ns()
        pictures: dict[int, PictureSpan] = {}
        outcome = "ok"
        try:
            async with aclosing(self._inner.draw(tasks)) as events:
                async for event in events:
                    # A request that is refused has no pictures: they begin with the first news.
                    pictures = pictures or self._pictures(span, tasks, began_ns)
                    pictures[event.index].heard(event)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            # Whoever has all pictures may leave before the generator's end.
            if not pictures or any(picture.open for picture in pictures.values()):
                outcome = "cancelled"
            raise
        except Exception as error:
            outcome = row_of(error).code
            raise
        finally:
            for picture in pictures.values():
                picture.abandon(outcome)
            self._end(span, outcome, pictures.values())

    def _pictures(
        self, span: Span, tasks: Sequence[PictureTask], began_ns: int
    ) -> dict[int, PictureSpan]:
        parent = trace.set_span_in_context(span, context.Context())
        return {
            task.index: PictureSpan(task, self._traces, parent, began_ns=began_ns) for task in tasks
        }

    def _end(self, span: Span, outcome: str, pictures: Collection[PictureSpan]) -> None:
        failed = [picture.outcome for picture in pictures if picture.outcome != "ok"]
        outcome = failed[0] if failed and outcome == "ok" else outcome
        span.set_attribute("darkroom.outcome", outcome)
        if outcome not in ("ok", "cancelled"):
            span.set_attribute("error.type", outcome)
            span.set_status(StatusCode.ERROR)
        span.end(self._traces.now_ns())

    # ------------------------------------------------------------------ passed on

    async def models(self) -> Sequence[ModelInfo]:
        """The configured models; the default first."""
        return await self._inner.models()

    async def change_model(self, change: ModelChange) -> ModelInfo | None:
        """Add, reload or remove a model; see :meth:`Dispatcher.change_model`."""
        return await self._inner.change_model(change)

    async def ask_caches(self, order: CacheOrder) -> Sequence[CacheAnswer]:
        """See :meth:`Dispatcher.ask_caches`."""
        return await self._inner.ask_caches(order)

    async def set_log_level(self, level: Level) -> None:
        """See :meth:`Dispatcher.set_log_level`."""
        await self._inner.set_log_level(level)

    async def readiness(self) -> Readiness:
        """Whether every configured model is warm."""
        return await self._inner.readiness()

    async def load(self) -> Load:
        """How busy the application is."""
        return await self._inner.load()

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """(replica name, Prometheus text) of those that answer."""
        return await self._inner.metrics()

    async def close(self, timeout_s: float) -> None:
        """Take nothing more, finish what runs, and give up after ``timeout_s`` seconds."""
        await self._inner.close(timeout_s)
