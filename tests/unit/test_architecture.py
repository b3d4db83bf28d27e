"""Imports run one way: ``server -> engine``, ``server -> cache``, ``cache -> engine``'s nouns."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("engine", "cache", "server", "models", "loadtests", "tests")

ALLOWED = {
    "engine": ("engine",),
    "cache": ("cache", "engine.types", "engine.ports", "engine.errors"),
    "server": ("server", "engine", "cache"),
}
FOREIGN = {
    "engine": ("fastapi", "starlette", "ray", "redis", "prometheus_client", "uvicorn"),
    "cache": ("fastapi", "starlette", "ray", "diffusers", "transformers"),
    "server": ("diffusers", "transformers"),
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_arrow_points_back(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imports_of(path)
        if (within(name, OURS) and not within(name, ALLOWED[package]))
        or within(name, FOREIGN[package])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "engine.types",
        "engine.errors",
        "engine.ports",
        "engine.scheduler",
        "server.cli",
        "server.gateway",
        "server.gateway_deployment",
        "server.router_deployment",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """Gateways and routers stay small; the command answers ``--help`` at once."""
    heavy = {"torch", "diffusers", "transformers", "onnxruntime", "onnx"}
    code = f"import sys, {module}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_gateway_that_sends_no_traces_does_not_import_what_would() -> None:
    """FastAPI and Ray bring OpenTelemetry's interface and SDK; nothing of theirs can send."""
    code = (
        "import sys, server.gateway_deployment\n"
        "from server.config import ServeConfig\n"
        "from server.services import open_services\n"
        "assert open_services(ServeConfig(), None).traces is None\n"
        "print(*(name for name in sys.modules if 'otlp' in name or name.startswith('server.tele')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"", ".config", ".opening"}
    assert set(done.stdout.split()) == {f"server.telemetry{name}" for name in allowed}


def test_the_environment_is_read_in_one_module() -> None:
    readers = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sorted((ROOT / package).rglob("*.py"))
        if "os.environ" in path.read_text() or "os.getenv" in path.read_text()
    ]
    assert readers == ["server/settings.py"]
