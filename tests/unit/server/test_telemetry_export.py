"""What happens to spans that have ended, and to configurations that say where they go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry, Counter
from typer.testing import CliRunner

from engine.errors import BackendUnavailableError, InvalidRequestError
from server.cli import app
from server.config_file import checked_config, read_config
from server.settings import served_config
from server.telemetry import opening
from server.telemetry.config import TelemetryConfig
from server.telemetry.export import SpanQueue
from server.telemetry.opening import check_installed

PATIENCE_S = 30.0
SECRET = "dGhlIGtleSBvZiB0aGUgcmVjZWl2ZXI"


class Receiver(SpanExporter):
    """An exporter that blocks, fails or breaks when it is told to."""

    def __init__(self, outcome: SpanExportResult | Exception = SpanExportResult.SUCCESS) -> None:
        self.outcome = outcome
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Event()
        self.batches: list[int] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.open.wait(PATIENCE_S)
        self.batches.append(len(spans))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def shutdown(self) -> None:
        self.open.set()


class Queue:
    """A queue over ``receiver``, with its counts."""

    def __init__(self, receiver: Receiver, *, max_spans: int = 1000, every_s: float = 0.0) -> None:
        self._registry = CollectorRegistry()
        counter = Counter("spans", "", ("outcome",), registry=self._registry)
        self.queue = SpanQueue(receiver, counter, max_spans=max_spans, every_s=every_s)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(self.queue)
        self._tracer = provider.get_tracer("test")

    def end(self, spans: int) -> None:
        for _ in range(spans):
            self._tracer.start_span("span").end()

    def counted(self) -> dict[str, float]:
        outcomes = ("exported", "failed", "dropped")
        values = {
            name: self._registry.get_sample_value("spans_total", {"outcome": name})
            for name in outcomes
        }
        return {name: value for name, value in values.items() if value}


def test_what_ended_is_exported_before_the_end() -> None:
    receiver = Receiver()
    queue = Queue(receiver, every_s=PATIENCE_S)
    queue.end(600)
    queue.queue.close(PATIENCE_S)
    assert sum(receiver.batches) == 600
    assert max(receiver.batches) <= 256
    assert queue.counted() == {"exported": 600}


def test_spans_leave_without_being_asked_to() -> None:
    receiver = Receiver()
    queue = Queue(receiver)
    for _ in range(2):  # the second time, its thread has slept
        receiver.asked.clear()
        queue.end(1)
        assert receiver.asked.wait(PATIENCE_S)
    queue.queue.close(PATIENCE_S)


def test_a_receiver_that_hangs_costs_spans_and_not_time() -> None:
    receiver = Receiver()
    receiver.open.clear()
    queue = Queue(receiver, max_spans=5)
    queue.end(1)
    assert receiver.asked.wait(PATIENCE_S)  # the first one is on its way, for ever
    queue.end(20)
    assert queue.counted() == {"dropped": 15}
    queue.queue.close(0.01)
    assert queue.counted()["dropped"] == 20
    queue.end(1)
    assert queue.counted()["dropped"] == 21


@pytest.mark.parametrize("outcome", [SpanExportResult.FAILURE, RuntimeError("broken")])
def test_what_is_not_taken_is_counted_and_said_once(
    outcome: SpanExportResult | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(outcome)
    queue = Queue(receiver)
    queue.end(600)
    queue.queue.close(PATIENCE_S)
    assert queue.counted() == {"failed": 600}
    assert len(receiver.batches) > 1
    said = [record for record in caplog.records if "takes none" in record.message]
    assert len(said) == 1


# ------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("collector:4318", "begin with http"),
        ("http://", "name a host"),
        ("http://host:many", "no address"),
        (f"http://user:{SECRET}@host", "credentials"),
        (f"http://host?key={SECRET}", "credentials"),
        ("http://host:4318/v1/traces/", "base"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(tmp_path: Path, endpoint: str, why: str) -> None:
    path = tmp_path / "darkroom.yaml"
    path.write_text(f"telemetry: {{endpoint: '{endpoint}'}}\n")
    with pytest.raises(InvalidRequestError, match=rf"telemetry\.endpoint.*{why}") as raised:
        read_config(path)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "telemetry",
    [
        {"endpont": "http://host"},
        {"headers": {"a b": SECRET}},
        {"headers": {"authorization": SECRET + "\n"}},
        {"headers": SECRET},
        {"sample_ratio": 1.1},
        {"max_queued_spans": 0},
    ],
)
def test_a_bad_value_is_refused_and_no_header_repeated(telemetry: dict[str, Any]) -> None:
    [key] = telemetry
    with pytest.raises(InvalidRequestError, match=rf"telemetry\.{key}") as raised:
        checked_config({"telemetry": telemetry})
    assert SECRET not in str(raised.value)


def test_the_standard_variables_count() -> None:
    telemetry = served_config(
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector.example/otlp/",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{SECRET}, x-scope=a",
            "OTEL_SERVICE_NAME": "pictures",
        }
    ).telemetry
    assert telemetry.traces_url == "https://collector.example/otlp/v1/traces"
    assert telemetry.service_name == "pictures"
    headers = {name: value.get_secret_value() for name, value in telemetry.headers.items()}
    assert headers == {"authorization": f"Bearer {SECRET}", "x-scope": "a"}


def test_config_show_hides_headers(tmp_path: Path) -> None:
    path = tmp_path / "darkroom.yaml"
    path.write_text(f"telemetry: {{endpoint: 'http://h:1', headers: {{x-key: {SECRET}}}}}\n")
    shown = CliRunner().invoke(app, ["config", "show", "--config", str(path)])
    assert shown.exit_code == 0
    assert SECRET not in shown.output
    assert "x-key: '**********'" in shown.output
    assert SECRET not in repr(read_config(path))


def test_without_the_extra_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleSpec | None:
        assert name.count(".") <= 1, "a module is looked for below one that is not there"
        return None if name == "opentelemetry.exporter" else ModuleSpec(name, None)

    monkeypatch.setattr(opening, "find_spec", absent)
    check_installed(TelemetryConfig())
    with pytest.raises(BackendUnavailableError, match=r"darkroom\[otel\]"):
        check_installed(TelemetryConfig(endpoint="http://h:1"))
    checked = CliRunner().invoke(
        app, ["config", "check"], env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1"}
    )
    assert isinstance(checked.exception, BackendUnavailableError)
