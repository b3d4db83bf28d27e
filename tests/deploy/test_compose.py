"""The smoke script against the composed stack, built and started for real.

Where ``COMPOSE`` names the command of a stack that is up, that one is asked (and stopped at the
end). Otherwise one is built and brought up beside whatever else runs here, and taken down again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import free_port

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
PORTS = ("DARKROOM", "REDIS", "PROMETHEUS", "GRAFANA", "LOADTEST")


def _composes() -> bool:
    """Whether there is an engine, and compose."""
    if shutil.which("docker") is None:
        return False
    asked = (["docker", "compose", "version"], ["docker", "info"])
    return all(
        subprocess.run(ask, capture_output=True, check=False).returncode == 0 for ask in asked
    )


@pytest.fixture(scope="module")
def stack() -> Iterator[dict[str, str]]:
    """The environment in which the smoke script finds its stack."""
    if "COMPOSE" in os.environ:
        yield dict(os.environ)
        return
    if not _composes():
        pytest.skip("needs a container engine and compose")
    environment = {
        **os.environ,
        "COMPOSE": "docker compose",
        "COMPOSE_PROJECT_NAME": "darkroom-smoke",
        "COMPOSE_PROFILES": "load",
        "DARKROOM_IMAGE": "darkroom:smoke",
        "DARKROOM_LOAD_IMAGE": "darkroom:smoke-load",
        **{f"{name}_PUBLISHED_PORT": str(free_port()) for name in PORTS},
    }
    up = ["docker", "compose", "up", "-d", "--build", "--wait"]
    try:
        done = subprocess.run(
            up, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        yield environment
    finally:
        down = ["docker", "compose", "down", "-v", "--timeout", "5"]
        subprocess.run(down, cwd=ROOT, env=environment, capture_output=True, check=False)


def test_the_composed_stack_does_what_it_must(stack: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "deploy/compose/smoke.py"],
        cwd=ROOT,
        env=stack,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
