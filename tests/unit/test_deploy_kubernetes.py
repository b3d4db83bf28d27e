"""The manifests of deploy/kubernetes agree with themselves and with our configuration."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import deployed_config
from tests.deploy_files import DEPLOY, alerts, documents
from tests.faults.cluster import ray_environment


def test_the_service_selects_the_pods_that_have_a_gateway() -> None:
    base = DEPLOY / "kubernetes" / "base"
    ray_service = documents(base / "rayservice.yaml")[0]
    service, budget = documents(base / "service.yaml")
    group = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    labels = group["metadata"]["labels"]
    ports = {port["name"] for port in group["spec"]["containers"][0]["ports"]}

    assert service["spec"]["selector"].items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_the_budget_lets_a_drain_through_and_leaves_a_gateway() -> None:
    base = DEPLOY / "kubernetes" / "base"
    cluster = documents(base / "rayservice.yaml")[0]["spec"]["rayClusterConfig"]
    budget = documents(base / "service.yaml")[1]["spec"]

    # maxUnavailable, or a percentage, needs a scale subresource, which RayCluster has not: it
    # blocks every drain.
    assert "maxUnavailable" not in budget
    assert type(budget["minAvailable"]) is int
    assert 1 <= budget["minAvailable"] < cluster["workerGroupSpecs"][0]["minReplicas"]


def test_the_rules_of_the_operator_are_in_step() -> None:
    from deploy.kubernetes.build import WRITTEN, render

    resources = documents(DEPLOY / "kubernetes" / "base" / "kustomization.yaml")[0]["resources"]
    rules = {
        rule.get("alert") or rule["record"]
        for group in documents(WRITTEN)[0]["spec"]["groups"]
        for rule in group["rules"]
    }

    assert WRITTEN.name in resources
    assert WRITTEN.read_text() == render()
    assert {alert["alert"] for alert in alerts()} < rules


def test_every_pod_is_scraped_for_rays_own_metrics() -> None:
    monitor = documents(DEPLOY / "kubernetes" / "base" / "servicemonitor.yaml")[1]["spec"]
    cluster = _cluster()
    wanted = monitor["selector"]["matchLabels"].items()
    port = monitor["podMetricsEndpoints"][0]["port"]

    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert wanted <= group["template"]["metadata"]["labels"].items()
    for pod in _pods(cluster):
        assert port in {named["name"] for named in pod["containers"][0]["ports"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl's kustomize")
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_prometheus_finds_the_service_from_another_namespace(tmp_path: Path, overlay: str) -> None:
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "overlays" / overlay
    given = (folder / "kustomization.yaml").read_text()
    (folder / "kustomization.yaml").write_text(
        given.replace("namespace: darkroom\n", "namespace: pictures\n")
    )

    built = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    ).stdout
    named = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(built)}
    service = named["Service", "darkroom"]
    target = named["ScrapeConfig", "darkroom"]["spec"]["staticConfigs"][0]["targets"]

    assert {one["metadata"]["namespace"] for one in named.values()} == {"pictures"}
    assert target == [f"darkroom.pictures.svc:{service['spec']['ports'][0]['port']}"]
    assert ("PrometheusRule", "darkroom") in named


def _cluster() -> dict[str, Any]:
    """The Ray cluster of the RayService, with the group of the gpu overlay in it."""
    kubernetes = DEPLOY / "kubernetes"
    cluster: dict[str, Any] = documents(kubernetes / "base" / "rayservice.yaml")[0]["spec"][
        "rayClusterConfig"
    ]
    [addition] = documents(kubernetes / "overlays" / "gpu" / "gpu-group.yaml")[0]
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


def test_the_configurations_of_the_cluster_are_valid() -> None:
    kubernetes = DEPLOY / "kubernetes"
    ray_service = documents(kubernetes / "base" / "rayservice.yaml")[0]["spec"]
    patch = documents(kubernetes / "overlays" / "gpu" / "gpu-application.yaml")[0][0]
    for text in (ray_service["serveConfigV2"], patch["value"]):
        application = yaml.safe_load(text)["applications"][0]

        assert application["import_path"] == "server.app:build"
        environment = {"DARKROOM_REDIS_URL": "redis://redis:6379/0"}  # the secret's
        assert not deployed_config(application["args"], environment).http.loopback
