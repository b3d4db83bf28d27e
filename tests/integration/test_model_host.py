"""Configured models on their runtimes: each as it is configured, and no more runtimes than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.runtime import Runtime, choices, open_runtime
from server.config import ModelConfig, ServeConfig
from server.worker_models import ModelHost
from tests.serving import settings_for


def test_a_model_runs_as_it_is_configured_and_shares_the_runtime_of_those_alike(
    tiny_checkpoint: Callable[[str], Path],
    plans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    really = open_runtime

    def opened(name: str, **config: Any) -> Runtime:
        asked.append((name, dict(config)))
        return really(name, device="cpu", threads=1)

    monkeypatch.setattr(choices, "open_runtime", opened)
    models = (
        ModelConfig(id="text", path=tiny_checkpoint("text")),
        ModelConfig(id="again", path=tiny_checkpoint("text")),
        ModelConfig(id="torch", path=tiny_checkpoint("text"), backend="torch", compile=True),
    )
    host = ModelHost(ServeConfig(models=models), settings_for(plans, tmp_path / "home"))
    for model in models:
        host.open(host.plan(model), model).close()
    host.close()
    plain = {"device": "cpu", "threads": 1, "tensorrt": False}
    compiled = {"device": "cpu", "threads": 1, "compile": True, "cuda_graphs": False}
    assert asked == [("onnxruntime", plain), ("torch", compiled)]


def test_one_plan_runs_as_each_model_of_it_is_configured(
    tiny_checkpoint: Callable[[str], Path],
    plans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    really = open_runtime

    def opened(name: str, **config: Any) -> Runtime:
        asked.append(config["compile"])
        return really(name, device="cpu", threads=1)

    monkeypatch.setattr(choices, "open_runtime", opened)
    plain = ModelConfig(id="plain", path=tiny_checkpoint("text"), backend="torch")
    compiled = plain.model_copy(update={"id": "compiled", "compile": True})
    host = ModelHost(ServeConfig(), settings_for(plans, tmp_path / "home"))
    first, last = host.plan(plain), host.plan(compiled)
    assert first.digest == last.digest
    host.open(first, plain).close()
    host.open(last, compiled).close()
    host.close()
    assert asked == [False, True]


def test_what_cannot_run_here_is_refused_before_it_is_compiled(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path: Path
) -> None:
    host = ModelHost(ServeConfig(), settings_for(plans, tmp_path / "home"))
    model = ModelConfig(id="text", path=tiny_checkpoint("text"), backend="torch", cuda_graphs=True)
    with pytest.raises(InvalidRequestError, match="needs device cuda"):
        host.plan(model)
