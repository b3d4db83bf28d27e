"""Rules, dashboards and tables of deploy/ agree. What runs them for real is in the long tests."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.deploy_files import DEPLOY, alerts, documents


def test_every_alert_has_a_paragraph_and_every_paragraph_an_alert() -> None:
    headings = re.findall(r"^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)

    assert headings == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["annotations"]["runbook"].endswith("#" + alert["alert"].lower())


def test_every_alert_is_tested() -> None:
    tests = documents(DEPLOY / "prometheus" / "tests" / "alerts.yml")[0]["tests"]
    tested = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }

    assert tested == {alert["alert"] for alert in alerts()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is Debian's prometheus")
def test_the_rules_do_what_their_tests_say() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", DEPLOY / "prometheus" / "tests" / "alerts.yml"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is Debian's prometheus")
def test_the_configuration_of_prometheus_is_valid() -> None:
    config = DEPLOY / "prometheus" / "prometheus.yml"
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", config],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_exemplars_are_stored_where_they_are_shown() -> None:
    from deploy.grafana.boards import BOARDS
    from deploy.grafana.panels import WITH_EXEMPLARS

    prometheus = documents(DEPLOY / "prometheus" / "prometheus.yml")[0]
    services = documents(DEPLOY.parent / "docker-compose.yml")[0]["services"]
    shown = " ".join(
        query.expr
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
        if query.exemplars
    )

    assert prometheus["storage"]["exemplars"]["max_exemplars"] > 0
    assert "--enable-feature=exemplar-storage" in services["prometheus"]["command"]
    assert set(re.findall(r"(darkroom_\w+)_bucket", shown)) <= WITH_EXEMPLARS
    assert "darkroom_http_request_seconds_bucket" in shown


def test_the_dashboards_are_in_step_with_their_code() -> None:
    from deploy.grafana.boards import BOARDS
    from deploy.grafana.build import FOLDER, render

    assert {path.stem for path in FOLDER.glob("*.json")} == {board.uid for board in BOARDS}
    for board in BOARDS:
        assert (FOLDER / f"{board.uid}.json").read_text() == render(board)


def test_every_failure_of_the_server_counts_against_the_objective() -> None:
    from server.errors import INTERNAL, TABLE

    not_counted = {
        "draining",  # a refusal: the next gateway takes the request
        "cache_unavailable",  # of an operator's routes, which the objective is not about
    }
    failures = {row.code for _, row in TABLE if row.status >= 500} | {INTERNAL.code}
    text = (DEPLOY / "prometheus" / "rules" / "recording.yml").read_text()
    counted = [set(codes.split("|")) for codes in re.findall(r'outcome=~"([^"]+)"', text)]

    assert len(counted) == 4
    for codes in counted:
        assert codes == failures - not_counted


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from engine.noise_statistics import ReuseCounts
    from engine.ports import CacheStatistics
    from server.cache_metrics import CacheCollector
    from server.config import ServeConfig
    from server.messages import Load
    from server.metrics import GatewayMetrics
    from server.metrics_page import families_of
    from server.router_metrics import RouterMetrics
    from server.settings import Settings
    from server.worker_core import WorkerCore

    cache = CollectorRegistry()
    cache.register(CacheCollector(ReuseCounts().statistics, lambda: CacheStatistics(backend="m")))
    texts = [
        GatewayMetrics().page([]),
        RouterMetrics().text(Load(), 0),
        WorkerCore(ServeConfig(), Settings.from_environment({})).metrics_text(),
        generate_latest(cache),
    ]
    counted = {
        (family.name, family.type)
        for text in texts
        for family in families_of(text)
        if not family.name.endswith("_created")
    }
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (DEPLOY / "METRICS.md").read_text(), re.MULTILINE)

    assert len(rows) == len(set(rows))
    assert set(rows) == counted


def test_dashboards_and_alerts_name_no_metric_that_is_not_there() -> None:
    from deploy.grafana.boards import BOARDS

    known = set(re.findall(r"^\| `(\w+)` \|", (DEPLOY / "METRICS.md").read_text(), re.MULTILINE))
    asked = " ".join(
        query.expr
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
    )
    asked += " ".join(path.read_text() for path in (DEPLOY / "prometheus" / "rules").glob("*.yml"))
    names = {
        re.sub(r"_(total|bucket|sum|count)$", "", name)
        for name in re.findall(r"\bdarkroom_\w+", asked)
    }

    assert names
    assert names <= known
