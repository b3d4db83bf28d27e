"""Traces of the whole application over a real engine, as a real OTLP receiver gets them."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import CollectorRegistry, Counter

from loadtests.server_processes import free_port
from server.auth import new_key
from server.messages import Drawn, PictureEvent, Started, Stepped
from server.settings import Settings
from server.telemetry.config import TelemetryConfig
from server.telemetry.drawing import TracedDispatcher
from server.telemetry.traces import Traces
from tests.clients.local import listening
from tests.routed import routed
from tests.serving import MODEL, a_task, settings_for, tiny_config

PATIENCE_S = 60.0
PROMPT, NEGATIVE = "a red umbrella in the rain", "blurred, and without a handle"
KEY, RECEIVERS_KEY = new_key(), "the key of the receiver"
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PHASES = ("queue", "encode", "cache", "denoise", "decode")
STEPS = 6


@dataclass
class Receiver:
    """What came in over OTLP/HTTP."""

    url: str = ""
    raw: bytes = b""
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    def post(self, path: str, key: str | None, encoding: str | None, body: bytes) -> int:
        if path != "/v1/traces" or encoding != "gzip":
            return 404
        content = gzip.decompress(body)
        self.raw += content
        self.requests.append(ExportTraceServiceRequest.FromString(content))
        self.keys.add(key)
        return 200

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def of_request(self, name: str) -> Spans:
        """The spans of the trace in which ``name`` is the server's request."""
        [trace] = {s.trace_id for s in self.spans if said(s).get("darkroom.request_id") == name}
        return Spans([span for span in self.spans if span.trace_id == trace])


@dataclass
class Spans:
    """The spans of one trace."""

    all: list[Span]

    def one(self, name: str) -> Span:
        [found] = [span for span in self.all if span.name == name]
        return found

    def below(self, parent: Span) -> list[Span]:
        return [span for span in self.all if span.parent_span_id == parent.span_id]


def said(span: Span | Span.Event) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, str(pair.value.WhichOneof("value")))
        for pair in span.attributes
    }


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            encoding = self.headers["content-encoding"]
            status = receiver.post(self.path, self.headers["x-key"], encoding, body)
            reply = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def settings(plans: Path, tmp_path: Path) -> Settings:
    return settings_for(plans, tmp_path / "home")


def drawn(url: str, name: str, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY.key}", "x-request-id": name}
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "seed": 7, **body}
    if "parent" in asked:
        headers["traceparent"] = asked.pop("parent")
    return httpx.post(
        f"{url}/v1/images/generations", json=asked, headers=headers, timeout=PATIENCE_S
    )


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture
def traced(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> Iterator[tuple[Receiver, dict[str, httpx.Response]]]:
    """What was received of a few requests, once the server has ended; and its replies."""
    with receiving() as receiver:
        config = tiny_config(
            tiny_checkpoint("text"),
            http={"port": free_port()},
            auth={"tenants": [{"id": "shop", "key_hashes": [KEY.hash]}]},
            telemetry={
                "endpoint": receiver.url,
                "headers": {"x-key": RECEIVERS_KEY},
                "service_name": "pictures",
                "flush_timeout_s": 8.0,
            },
        )
        with listening(config, settings) as url:
            replies = {
                "plain": drawn(url, "plain", parent=f"00-{TRACE}-{CALLER}-01"),
                "pair": drawn(url, "pair", n=2, stream=True, cache={"mode": "approximate"}),
                "unsampled": drawn(url, "unsampled", parent=f"00-{'a' * 32}-{'b' * 16}-00"),
                "refused": drawn(url, "refused", solver="ddim", schedule="karras"),
            }
        yield receiver, replies


def test_a_receiver_gets_the_tree_of_each_request(
    traced: tuple[Receiver, dict[str, httpx.Response]],
) -> None:
    receiver, replies = traced
    assert [reply.status_code for reply in replies.values()] == [200, 200, 200, 422]
    assert receiver.keys == {RECEIVERS_KEY}
    of_service = {
        pair.value.string_value
        for request in receiver.requests
        for resource in request.resource_spans
        for pair in resource.resource.attributes
        if pair.key == "service.name"
    }
    assert of_service == {"pictures"}
    _is_one_tree(receiver.of_request("plain"), replies["plain"])
    _is_a_pair(receiver.of_request("pair"))
    _is_an_error(receiver.of_request("refused"))
    assert all(said(span).get("darkroom.request_id") != "unsampled" for span in receiver.spans)
    secrets = (PROMPT, NEGATIVE, KEY.key, KEY.hash, RECEIVERS_KEY, "umbrella", "handle")
    assert [secret for secret in secrets if secret.encode() in receiver.raw] == []


def _is_one_tree(spans: Spans, reply: httpx.Response) -> None:
    root, draw, picture = (
        spans.one(name) for name in ("POST /v1/images/generations", "draw", "picture")
    )
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, CALLER)
    assert root.kind == Span.SPAN_KIND_SERVER
    assert said(root)["http.response.status_code"] == 200
    assert spans.below(root) == [draw]
    assert spans.below(draw) == [picture]
    for span in (root, draw, picture):
        assert (said(span)["darkroom.tenant"], said(span)["darkroom.model"]) == ("shop", MODEL)
    told = said(picture)
    told_steps = told["darkroom.steps"]
    assert (told_steps, told["darkroom.attempts"], told["darkroom.cache"]) == (STEPS, 1, "off")
    assert (told["darkroom.width_px"], told["darkroom.height_px"]) == (32, 32)
    assert told["darkroom.worker"]
    phases = spans.below(picture)
    # One for each phase that the reply says took any time, in order, and as long as it says.
    told_ms = {name: float(reply.headers[f"x-darkroom-{name}-ms"]) for name in PHASES}
    assert told_ms["denoise"] > 0
    by_start = sorted(phases, key=lambda span: (span.start_time_unix_nano, PHASES.index(span.name)))
    assert [span.name for span in by_start] == [
        name for name in PHASES if name in {phase.name for phase in phases}
    ]
    assert {name for name in PHASES if told_ms[name] > 0} <= {span.name for span in phases}
    for span in phases:
        assert seconds(span) * 1e3 == pytest.approx(told_ms[span.name], abs=0.006)
    assert sum(map(seconds, phases)) * 1e3 == pytest.approx(sum(told_ms.values()), abs=0.03)
    for outer, inner in [(root, draw), (draw, picture), *((picture, phase) for phase in phases)]:
        assert outer.start_time_unix_nano <= inner.start_time_unix_nano
        assert inner.end_time_unix_nano <= outer.end_time_unix_nano
    denoise = spans.one("denoise")
    assert [event.name for event in denoise.events] == ["tick"] * STEPS
    assert [said(event)["darkroom.step"] for event in denoise.events] == list(range(1, STEPS + 1))
    times = [event.time_unix_nano for event in denoise.events]
    assert denoise.start_time_unix_nano < times[0]
    assert times == sorted(times)
    assert times[-1] <= denoise.end_time_unix_nano
    assert "started" in [event.name for event in picture.events]


def _is_a_pair(spans: Spans) -> None:
    draw = spans.one("draw")
    assert spans.one("POST /v1/images/generations").parent_span_id == b""
    pictures = sorted(spans.below(draw), key=lambda span: int(said(span)["darkroom.index"]))
    assert [(span.name, said(span)["darkroom.index"]) for span in pictures] == [
        ("picture", 0),
        ("picture", 1),
    ]
    for picture in pictures:
        assert {"encode", "denoise", "decode"} <= {span.name for span in spans.below(picture)}
        assert said(picture)["darkroom.cache"] in {"hit", "miss", "slow"}
    rows = {
        said(event)["darkroom.batch_rows"]
        for span in spans.all
        if span.name == "denoise"
        for event in span.events
    }
    assert rows <= {1, 2, 4}


def _is_an_error(spans: Spans) -> None:
    picture = spans.one("picture")
    assert said(picture)["error.type"] == "unsupported"
    assert picture.status.code == spans.one("draw").status.code == Status.STATUS_CODE_ERROR
    # The client's mistake is none of the server's.
    root = spans.one("POST /v1/images/generations")
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert said(root)["darkroom.outcome"] == "unsupported"


def test_a_receiver_that_is_away_costs_spans_and_no_request(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> None:
    config = tiny_config(
        tiny_checkpoint("text"),
        http={"port": free_port()},
        auth={"tenants": [{"id": "shop", "key_hashes": [KEY.hash], "operator": True}]},
        telemetry={
            "endpoint": f"http://127.0.0.1:{free_port()}",
            "timeout_s": 0.2,
            "flush_timeout_s": 0.5,
            "max_queued_spans": 4,
        },
    )
    with listening(config, settings) as url:
        replies = [drawn(url, f"r{number}") for number in range(3)]
        assert [reply.status_code for reply in replies] == [200] * 3
        ends_at_s = time.monotonic() + PATIENCE_S
        while not (counted := _spans_by_outcome(url)).get("failed"):
            assert time.monotonic() < ends_at_s, "no span was counted as failed"
            time.sleep(0.1)
    assert counted["dropped"] > 0
    assert "exported" not in counted


def _spans_by_outcome(url: str) -> dict[str, float]:
    headers = {"authorization": f"Bearer {KEY.key}"}
    page = httpx.get(f"{url}/metrics", headers=headers, timeout=PATIENCE_S).text
    lines = [line for line in page.splitlines() if line.startswith("darkroom_trace_spans_total{")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def test_a_picture_that_moved_says_so(
    tiny_checkpoint: Callable[[str], Path], settings: Settings
) -> None:
    async def scenario(traces: Traces) -> Drawn:
        config = tiny_config(tiny_checkpoint("text"), workers={"snapshot_every_s": 1e-6})
        async with routed(config, settings, workers=2) as (dispatcher, _, workers):
            events: list[PictureEvent] = []
            traced = TracedDispatcher(dispatcher, traces)
            async with aclosing(traced.draw([a_task(steps=60, listening=True)])) as stream:
                async for event in stream:
                    events.append(event)
                    begun = [e.worker for e in events if isinstance(e, Started)]
                    if isinstance(event, Stepped) and event.step == 30 and len(begun) == 1:
                        workers.kill(begun[0])
        [picture] = [event for event in events if isinstance(event, Drawn)]
        return picture

    with receiving() as receiver:
        counter = Counter("spans", "", ("outcome",), registry=CollectorRegistry())
        traces = Traces.over_http(TelemetryConfig(endpoint=receiver.url), counter)
        drawn = asyncio.run(scenario(traces))
        traces.close()
    spans = Spans(receiver.spans)
    picture = spans.one("picture")
    events = [event for event in picture.events if event.name in ("started", "failover")]
    assert [said(event)["darkroom.attempt"] for event in events] == [1, 2]
    assert said(picture)["darkroom.attempts"] == drawn.attempts == 2
    assert said(picture)["darkroom.worker"] == said(events[1])["darkroom.worker"]
    steps = [int(said(event)["darkroom.step"]) for event in spans.one("denoise").events]
    assert steps == list(range(steps[0], 61))
    assert steps[0] > 1  # it went on where it stood
