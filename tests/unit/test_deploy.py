"""What is in deploy/ agrees with itself. What runs it for real is in the long tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config_file import read_config
from server.settings import deployed_config
from tests.faults.cluster import ray_environment

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def _documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _alerts() -> list[dict[str, Any]]:
    groups = _documents(DEPLOY / "prometheus" / "rules" / "alerts.yml")[0]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_has_a_paragraph_and_every_paragraph_an_alert() -> None:
    headings = re.findall(r"^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)

    assert headings == [alert["alert"] for alert in _alerts()]
    for alert in _alerts():
        assert alert["annotations"]["runbook"].endswith("#" + alert["alert"].lower())


def test_every_alert_is_tested() -> None:
    tests = _documents(DEPLOY / "prometheus" / "tests" / "alerts.yml")[0]["tests"]
    tested = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }

    assert tested == {alert["alert"] for alert in _alerts()}


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

    prometheus = _documents(DEPLOY / "prometheus" / "prometheus.yml")[0]
    services = _documents(DEPLOY.parent / "docker-compose.yml")[0]["services"]
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


def test_the_service_selects_the_pods_that_have_a_gateway() -> None:
    base = DEPLOY / "kubernetes" / "base"
    ray_service = _documents(base / "rayservice.yaml")[0]
    service, budget = _documents(base / "service.yaml")
    group = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    labels = group["metadata"]["labels"]
    ports = {port["name"] for port in group["spec"]["containers"][0]["ports"]}

    assert service["spec"]["selector"].items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def _cluster() -> dict[str, Any]:
    """The Ray cluster of the RayService, with the group of the gpu overlay in it."""
    kubernetes = DEPLOY / "kubernetes"
    cluster: dict[str, Any] = _documents(kubernetes / "base" / "rayservice.yaml")[0]["spec"][
        "rayClusterConfig"
    ]
    [addition] = _documents(kubernetes / "overlays" / "gpu" / "gpu-group.yaml")[0]
    cluster["workerGroupSpecs"].append(addition["value"])
    return cluster


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [group["template"]["spec"] for group in groups]


def test_every_pod_of_the_cluster_has_the_environment_of_a_cluster_by_hand() -> None:
    by_hand = ray_environment()
    cluster = _cluster()

    assert cluster["authOptions"] == {"mode": by_hand.pop("RAY_AUTH_MODE")}
    for pod in _pods(cluster):
        given = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        assert {name: value for name, value in given.items() if name.startswith("RAY_")} == by_hand


def test_every_mount_of_the_cluster_has_its_volume() -> None:
    for spec in _pods(_cluster()):
        mounted = {mount["name"] for c in spec["containers"] for mount in c["volumeMounts"]}

        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_compose_publishes_on_loopback_only() -> None:
    services = _documents(DEPLOY.parent / "docker-compose.yml")[0]["services"]

    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", ["darkroom.yaml", "darkroom.gpu.yaml"])
def test_the_configurations_of_compose_are_valid(name: str) -> None:
    assert not read_config(DEPLOY / "compose" / name).http.loopback


def test_the_configurations_of_the_cluster_are_valid() -> None:
    kubernetes = DEPLOY / "kubernetes"
    ray_service = _documents(kubernetes / "base" / "rayservice.yaml")[0]["spec"]
    patch = _documents(kubernetes / "overlays" / "gpu" / "gpu-application.yaml")[0][0]
    for text in (ray_service["serveConfigV2"], patch["value"]):
        application = yaml.safe_load(text)["applications"][0]

        assert application["import_path"] == "server.app:build"
        environment = {"DARKROOM_REDIS_URL": "redis://redis:6379/0"}  # the secret's
        assert not deployed_config(application["args"], environment).http.loopback


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
