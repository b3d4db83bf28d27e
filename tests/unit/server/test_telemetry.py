"""Traces over a dispatcher that follows a script: what spans say, and what they never cost."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, Counter
from starlette.testclient import TestClient

from engine.errors import ExecutionError, OverloadedError
from engine.types import Reuse, ReuseOutcome, Timings
from server.auth import new_key
from server.config import AuthConfig, LoggingConfig, ServeConfig, TenantConfig
from server.gateway import create_app
from server.messages import Drawn, PictureEvent, PictureTask, Queued, Started, Stepped, Tick
from server.request_log import configure_logging
from server.services import Services, open_services
from server.telemetry import opening
from server.telemetry.config import TelemetryConfig
from server.telemetry.drawing import TracedDispatcher
from server.telemetry.pictures import PictureSpan
from server.telemetry.traces import MAX_EVENTS, Traces
from tests.serving import a_task, collect
from tests.unit.server.asgi import Call
from tests.unit.server.scripted import ScriptedDispatcher

ON = TelemetryConfig(endpoint="http://127.0.0.1:1")
PROMPT = "an umbrella that nobody may read about"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PHASES = {"queue", "encode", "cache", "denoise", "decode"}
NS = 1_000_000_000


class Traced:
    """Traces into memory."""

    def __init__(self, **config: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.registry = CollectorRegistry()
        counter = Counter("spans", "", ("outcome",), registry=self.registry)
        self.now_s = 1_000.0
        self.traces = Traces(
            self.exporter,
            TelemetryConfig(endpoint=ON.endpoint, **config),
            counter,
            now_ns=lambda: round(self.now_s * NS),
        )

    def spans(self) -> list[ReadableSpan]:
        """All that were made; there will be no more."""
        self.traces.close()
        return list(self.exporter.get_finished_spans())


def said(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(f"darkroom.{name}")


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / NS


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def only(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    [found] = [span for span in spans if span.name == name]
    return found


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """What :func:`served` traces into."""
    traced = Traced()
    monkeypatch.setattr(Traces, "over_http", lambda config, spans: traced.traces)
    return traced


def services_over(dispatcher: ScriptedDispatcher) -> Services:
    return open_services(ServeConfig(telemetry=ON), dispatcher)


def served(dispatcher: ScriptedDispatcher) -> TestClient:
    return TestClient(create_app(services_over(dispatcher)))


def asked(client: TestClient, *, headers: dict[str, str] | None = None, **body: Any) -> int:
    reply = client.post(
        "/v1/images/generations", json={"prompt": PROMPT, "steps": 8, **body}, headers=headers
    )
    return reply.status_code


# ------------------------------------------------------------------------------ what spans say


def test_a_request_becomes_a_tree(traced: Traced) -> None:
    headers = {"traceparent": PARENT, "x-request-id": "mine"}
    assert asked(served(ScriptedDispatcher()), headers=headers, n=2, seed=123_456_789) == 200

    spans = traced.spans()
    root = only(spans, "POST /v1/images/generations")
    draw = only(spans, "draw")
    pictures = [span for span in spans if span.name == "picture"]
    assert root.kind is SpanKind.SERVER
    assert (parent_of(root), parent_of(draw)) == (0x00F067AA0BA902B7, id_of(root))
    assert {span.context.trace_id for span in spans if span.context} == {
        0x4BF92F3577B34DA6A3CE929D0E0E4736
    }
    assert {parent_of(picture) for picture in pictures} == {id_of(draw)}
    assert sorted(said(picture, "index") for picture in pictures) == [0, 1]
    for span in (root, draw, *pictures):
        assert said(span, "outcome") == "ok"
        assert said(span, "request_id") == "mine"
        assert (said(span, "model"), said(span, "tenant")) == ("tintype", "anonymous")
    for picture in pictures:
        phases = [span for span in spans if parent_of(span) == id_of(picture)]
        assert {span.name for span in phases} == PHASES - {"cache"}  # it asked for none
        assert said(picture, "worker") == "worker-0"
        assert (said(picture, "solver"), said(picture, "steps")) == ("dpmpp_2m", 8)
        assert (said(picture, "width_px"), said(picture, "height_px")) == (64, 64)
        assert said(picture, "approximations") == ("precision=int8",)
    everything = "".join(span.to_json() for span in spans)
    assert PROMPT not in everything
    assert "123456789" not in everything


def test_looking_is_not_traced(traced: Traced) -> None:
    client = served(ScriptedDispatcher())
    assert client.get("/metrics").status_code == client.get("/healthz").status_code == 200
    assert traced.spans() == []


def test_what_is_turned_away_at_the_door_crowds_out_nothing(traced: Traced) -> None:
    tenant = TenantConfig(id="shop", key_hashes=(new_key().hash,))
    config = ServeConfig(telemetry=ON, auth=AuthConfig(tenants=(tenant,)))
    client = TestClient(create_app(open_services(config, ScriptedDispatcher())))
    lines = io.StringIO()
    configure_logging(LoggingConfig(), lines)
    assert asked(client) == 401
    assert traced.spans() == []
    assert "trace_id" not in lines.getvalue()


def test_a_refusal_has_no_picture(traced: Traced) -> None:
    refusing = ScriptedDispatcher(refusal=OverloadedError("full", retry_after_s=3.0))
    assert asked(served(refusing)) == 429
    spans = traced.spans()
    assert {span.name for span in spans} == {"draw", "POST /v1/images/generations"}
    assert {said(span, "outcome") for span in spans} == {"overloaded"}
    assert only(spans, "draw").status.status_code is StatusCode.ERROR
    # A status below 500 is the client's, by OpenTelemetry's conventions.
    root = only(spans, "POST /v1/images/generations")
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_an_error_wherever_it_was_told(traced: Traced, stream: bool) -> None:
    failing = ScriptedDispatcher(failures={1: ExecutionError("it broke")})
    assert asked(served(failing), n=2, stream=stream) == (200 if stream else 500)
    spans = traced.spans()
    root = only(spans, "POST /v1/images/generations")
    pictures = sorted(
        (span for span in spans if span.name == "picture"), key=lambda span: said(span, "index")
    )
    assert [said(picture, "outcome") for picture in pictures] == ["ok", "execution_failed"]
    for span in (root, only(spans, "draw"), pictures[1]):
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "execution_failed"


def test_a_client_that_leaves_is_no_error(traced: Traced) -> None:
    async def leave() -> None:
        dispatcher = ScriptedDispatcher(hangs=True)
        app = create_app(services_over(dispatcher))
        call = Call(app, "/v1/images/generations", {"prompt": PROMPT})
        running = asyncio.create_task(call.run())
        await dispatcher.started.wait()
        call.leave()
        await running

    asyncio.run(leave())
    spans = traced.spans()
    assert {span.name for span in spans} == {"POST /v1/images/generations", "draw", "picture"}
    assert {said(span, "outcome") for span in spans} == {"cancelled"}
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}


def test_a_job_goes_on_under_the_request_that_made_it(traced: Traced) -> None:
    async def run() -> str:
        services = services_over(ScriptedDispatcher())
        await services.start()
        call = Call(create_app(services), "/v1/jobs", {"prompt": PROMPT, "steps": 4})
        await call.run()
        job: str = json.loads(call.body)["id"]
        async with aclosing(services.jobs.follow(job, 0)) as events:
            async for _ in events:
                pass
        await services.close(1.0)
        return job

    job = asyncio.run(run())
    spans = traced.spans()
    assert parent_of(only(spans, "draw")) == id_of(only(spans, "POST /v1/jobs"))
    assert said(only(spans, "picture"), "request_id") == job


def test_a_draw_without_a_request_is_a_trace_of_its_own() -> None:
    traced = Traced()
    dispatcher = TracedDispatcher(ScriptedDispatcher(), traced.traces)
    asyncio.run(_drawn_by(dispatcher, [a_task(), a_task(index=1)]))
    spans = traced.spans()
    assert parent_of(only(spans, "draw")) is None
    assert len({span.context.trace_id for span in spans if span.context}) == 1


async def _drawn_by(dispatcher: TracedDispatcher, tasks: Sequence[PictureTask]) -> list[Any]:
    return await collect(dispatcher.draw(tasks))


def test_the_log_and_the_exemplar_name_the_trace(traced: Traced) -> None:
    lines = io.StringIO()
    configure_logging(LoggingConfig(), lines)
    client = served(ScriptedDispatcher())
    asked(client, headers={"traceparent": PARENT})
    [line] = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert line["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    page = client.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
    [sample] = [
        line
        for line in page.splitlines()
        if line.startswith("darkroom_http_request_seconds_bucket") and " # " in line
    ]
    assert 'trace_id="4bf92f3577b34da6a3ce929d0e0e4736"' in sample


# ------------------------------------------------------------------------------ where time went


@pytest.fixture
def picture_of() -> Any:
    """Tells a picture's span a list of (time, event); returns its spans by name."""

    def tell(news: Sequence[tuple[float, PictureEvent]]) -> dict[str, ReadableSpan]:
        traced = Traced()
        span = PictureSpan(a_task(), traced.traces, Context(), began_ns=round(100.0 * NS))
        for at_s, event in news:
            traced.now_s = at_s
            span.heard(event)
        assert not span.open
        return {span.name: span for span in traced.spans()}

    return tell


def _drawn(timings: Timings, *, ticks: tuple[Tick, ...] = (), attempts: int = 1) -> Drawn:
    return Drawn(
        index=0,
        data=b"",
        format="png",
        width_px=64,
        height_px=64,
        seed=1,
        solver="euler",
        schedule="karras",
        steps=len(ticks),
        guidance=4.0,
        model="tiny",
        plan_digest="d",
        worker="b",
        timings=timings,
        attempts=attempts,
        ticks=ticks,
        cache=Reuse(outcome=ReuseOutcome.HIT),
    )


def test_phases_lie_end_to_end_around_the_first_step(picture_of: Any) -> None:
    timings = Timings(queue_s=2.0, encode_s=0.25, cache_s=0.5, denoise_s=4.0, decode_s=1.0)
    ticks = (Tick(1, 8, 1.5, 1.5), Tick(2, 6, 4.0, 2.5))
    spans = picture_of(
        [
            (100.5, Queued(0, 3, 60)),
            (103.0, Started(0, "a")),
            (108.5, _drawn(timings, ticks=ticks)),
        ]
    )
    picture = spans["picture"]
    assert (picture.start_time, picture.end_time) == (100 * NS, 108.5 * NS)
    starts = {name: spans[name].start_time / NS - 100.0 for name in PHASES}
    assert starts == {"queue": 0.25, "encode": 2.25, "cache": 2.5, "denoise": 3.0, "decode": 7.0}
    assert sum(seconds(spans[name]) for name in PHASES) == timings.total_s
    assert [(event.name, event.timestamp / NS - 100.0) for event in spans["denoise"].events] == [
        ("tick", 4.5),
        ("tick", 7.0),
    ]
    assert spans["denoise"].events[1].attributes == {
        "darkroom.step": 2,
        "darkroom.batch_rows": 6,
        "darkroom.tick_ms": 2500.0,
    }
    assert [event.name for event in picture.events] == ["queued", "started"]
    assert said(picture, "cache") == "hit"


def test_news_of_the_first_step_that_came_late_moves_nothing_past_the_end(picture_of: Any) -> None:
    timings = Timings(queue_s=1.0, denoise_s=2.0, decode_s=1.0)
    spans = picture_of([(102.0, Started(0, "a")), (104.5, _drawn(timings))])
    assert spans["denoise"].start_time == 101.5 * NS
    assert spans["decode"].end_time == spans["picture"].end_time


def test_a_failover_is_told_and_the_second_start_counts(picture_of: Any) -> None:
    timings = Timings(queue_s=5.0, denoise_s=1.0)
    spans = picture_of(
        [
            (101.0, Started(0, "a")),
            (105.0, Started(0, "b", attempt=2)),
            (106.5, _drawn(timings, attempts=2)),
        ]
    )
    assert [event.name for event in spans["picture"].events] == ["started", "failover"]
    assert spans["denoise"].start_time == 105 * NS
    assert (said(spans["picture"], "attempts"), said(spans["picture"], "worker")) == (2, "b")


def test_a_thousand_steps_are_thinned_and_the_last_is_kept(picture_of: Any) -> None:
    ticks = tuple(Tick(step, 2, step / 100, 0.01) for step in range(1, 1001))
    drawn = _drawn(Timings(denoise_s=10.0), ticks=ticks)
    events = picture_of([(101.0, Started(0, "a")), (111.5, drawn)])["denoise"].events
    assert 100 < len(events) <= MAX_EVENTS
    assert events[-1].attributes["darkroom.step"] == 1000


# ------------------------------------------------------------------------------ what it costs


def test_what_is_not_sampled_is_not_touched() -> None:
    inner = ScriptedDispatcher()
    traced = Traced(sample_ratio=0.0)
    events = asyncio.run(_drawn_by(TracedDispatcher(inner, traced.traces), [a_task()]))
    assert isinstance(events[-1], Drawn)
    assert [task.traced for task in inner.tasks] == [False]
    assert traced.spans() == []


def test_a_sampled_task_hears_what_it_would_have_heard() -> None:
    """The decorator asks for ticks with the picture, and not for an event of every step."""
    inner = ScriptedDispatcher()
    events = asyncio.run(_drawn_by(TracedDispatcher(inner, Traced().traces), [a_task()]))
    assert [task.traced for task in inner.tasks] == [True]
    assert not any(isinstance(event, Stepped) for event in events)


def test_closing_early_closes_what_is_below() -> None:
    async def close() -> None:
        events: AsyncGenerator[PictureEvent, None] = dispatcher.draw([a_task()])
        async with aclosing(events):
            await anext(events)
        assert inner.closed == 1

    inner, traced = ScriptedDispatcher(), Traced()
    dispatcher = TracedDispatcher(inner, traced.traces)
    asyncio.run(close())
    assert {said(span, "outcome") for span in traced.spans()} == {"cancelled"}


def test_off_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise AssertionError("nobody asked for traces")

    monkeypatch.setattr(opening, "find_spec", refused)
    inner = ScriptedDispatcher()
    services = open_services(ServeConfig(), inner)
    assert services.traces is None
    assert services.dispatcher is inner
    asyncio.run(services.flush())
