"""Pages of metrics: what a gateway reads, joins and writes."""

from __future__ import annotations

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar, Sample

from engine.types import Timings
from server.exemplars import exemplar_of
from server.messages import Drawn, Load
from server.metrics import GatewayMetrics
from server.metrics_page import families_of, format_for
from server.router_metrics import RouterMetrics
from server.worker_metrics import WorkerMetrics
from tests.fake_clock import FakeClock

ID = "client-chosen:7f.3_A"


def a_picture() -> Drawn:
    return Drawn(
        index=0,
        data=b"",
        format="png",
        width_px=16,
        height_px=16,
        seed=1,
        solver="euler",
        schedule="karras",
        steps=4,
        guidance=1.0,
        model="tiny",
        plan_digest="d",
        worker="w",
        timings=Timings(queue_s=0.01, denoise_s=0.4, decode_s=0.02),
    )


def worker_page(request_id: str = ID) -> bytes:
    metrics = WorkerMetrics()
    metrics.drawn("tiny", a_picture(), request_id=f"{request_id}.{'0' * 12}")
    metrics.ticked("tiny", members=1, rows=2, seconds=0.1, most=8)
    return metrics.text()


def gateway(request_id: str = ID) -> GatewayMetrics:
    metrics = GatewayMetrics(clock=FakeClock(), name="gateway-0")
    metrics.ended(route="/r", outcome="ok", status=200, seconds=0.3, request_id=request_id)
    metrics.drew([a_picture()], tenant="t", request_id=request_id)
    metrics.previewed(0.2, request_id=request_id)
    return metrics


def joined(metrics: GatewayMetrics, *workers: bytes) -> dict[str, Metric]:
    """The page of a gateway, a router and workers, as the strict parser reads it."""
    pages = [("router-0", RouterMetrics().text(Load(), len(workers)))]
    pages += [(f"worker-{number}", page) for number, page in enumerate(workers)]
    text = metrics.page(pages, format="openmetrics").decode()
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1
    families: list[Metric] = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def exemplars(family: Metric) -> list[tuple[Sample, Exemplar]]:
    return [(sample, sample.exemplar) for sample in family.samples if sample.exemplar is not None]


def test_exemplars_of_every_process_reach_the_joined_page() -> None:
    families = joined(gateway(), worker_page(), worker_page("another"))

    for name in (
        "darkroom_http_request_seconds",
        "darkroom_picture_phase_seconds",
        "darkroom_first_preview_seconds",
        "darkroom_phase_seconds",
    ):
        assert exemplars(families[name]), name
    ((bucket, exemplar),) = exemplars(families["darkroom_http_request_seconds"])
    assert exemplar.labels == {"request_id": ID}
    assert exemplar.value == pytest.approx(0.3)
    assert exemplar.timestamp is not None
    assert bucket.labels == {"route": "/r", "le": "0.5", "replica": "gateway-0"}
    by_replica = {
        sample.labels["replica"]: exemplar.labels["request_id"]
        for sample, exemplar in exemplars(families["darkroom_phase_seconds"])
    }
    assert by_replica == {"worker-0": ID, "worker-1": "another"}


def test_a_joined_histogram_is_whole_for_each_replica() -> None:
    family = joined(gateway(), worker_page(), worker_page())["darkroom_tick_seconds"]

    for suffix in ("count", "sum"):
        found = {s.labels["replica"] for s in family.samples if s.name.endswith(f"_{suffix}")}
        assert found == {"worker-0", "worker-1"}
    assert family.type == "histogram"
    assert not any(sample.name.endswith("_created") for sample in family.samples)


def test_the_older_format_has_the_same_samples_and_no_exemplar() -> None:
    metrics = gateway()
    pages = [("worker-0", worker_page())]

    text = metrics.page(pages, format="text").decode()

    assert ID not in text
    assert "_created" not in text
    older = {
        (s.name, *sorted(s.labels.items())) for f in families_of(text.encode()) for s in f.samples
    }
    newer = {
        (s.name, *sorted(s.labels.items()))
        for f in families_of(metrics.page(pages, format="openmetrics"))
        for s in f.samples
    }
    assert older == newer


def test_a_worker_of_the_last_release_is_read_too() -> None:
    older = b"# HELP darkroom_steps_total S.\n# TYPE darkroom_steps_total counter\n"
    older += b'darkroom_steps_total{model="m"} 3\n'
    older += b"# TYPE darkroom_steps_created gauge\ndarkroom_steps_created 1e9\n"

    families = joined(gateway(), worker_page(), older)

    values = {s.labels["replica"]: s.value for s in families["darkroom_steps"].samples}
    assert values == {"worker-0": 1.0, "worker-1": 3.0}
    assert "darkroom_steps_created" not in families


@pytest.mark.parametrize("page", [b"\xff\xfe", b"<html>no metrics</html>\n# EOF\n"])
def test_what_is_no_page_is_as_good_as_no_answer(page: bytes) -> None:
    up = joined(gateway(), worker_page(), page)["darkroom_replica_up"].samples

    assert {sample.labels["replica"] for sample in up} == {"gateway-0", "router-0", "worker-0"}


@pytest.mark.parametrize(
    "request_id", ['x"} 1\n# EOF', "a b", "é", "x" * 65, "", "a\\", 'a",le="1', "x\n"]
)
def test_an_id_that_could_break_the_page_is_no_exemplar(request_id: str) -> None:
    assert exemplar_of(request_id) is None
    families = joined(gateway(request_id), worker_page(request_id))

    assert not any(exemplars(family) for family in families.values())


def test_the_longest_id_that_is_taken_makes_a_valid_exemplar() -> None:
    families = joined(gateway("x" * 64), worker_page("x" * 64))

    assert exemplars(families["darkroom_phase_seconds"])


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "text"),
        ("*/*", "text"),
        ("text/plain;version=0.0.4", "text"),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", "openmetrics"),
        # What Prometheus 2 and 3 send.
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
            "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "openmetrics",
        ),
        ("text/plain, application/openmetrics-text;q=0", "text"),
    ],
)
def test_the_scraper_gets_the_format_that_it_asks_for(accept: str, expected: str) -> None:
    assert format_for(accept) == expected
