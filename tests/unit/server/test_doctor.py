"""``darkroom doctor``: what it finds of Redis, and what it says of GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.compile.tensorrt_flavours import FLAVOURS
from server.doctor import Finding, examine
from server.settings import Settings
from tests.old_redis import old_redis
from tests.redis_server import RedisServer, free_port

Examine = Callable[[str | None], dict[str, Finding]]


@pytest.fixture
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """What is found with a Redis configured there, by part."""

    def of(redis_url: str | None) -> dict[str, Finding]:
        monkeypatch.delenv("DARKROOM_REDIS_URL", raising=False)
        if redis_url is not None:
            monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)
        settings = Settings(home=tmp_path, models=tmp_path, threads=1)
        return {finding.part: finding for finding in examine(settings)}

    return of


def test_without_redis_memory_serves_and_the_advice_says_what_it_would_bring(
    findings: Examine,
) -> None:
    redis = findings(None)["redis"]
    assert redis.state == "absent"
    assert "in memory" in redis.detail
    assert "DARKROOM_REDIS_URL" in redis.advice


def test_a_redis_that_answers_is_told_with_its_version(findings: Examine, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        redis = findings(server.url)["redis"]
    assert redis.state == "ok"
    assert redis.detail.endswith(f" at {server.url}")
    assert int(redis.detail.split(".")[0]) >= 7


def test_a_redis_that_does_not_answer_is_broken_and_its_password_is_not_shown(
    findings: Examine,
) -> None:
    redis = findings(f"redis://user:hunter2@127.0.0.1:{free_port()}/0")["redis"]
    assert redis.state == "broken"
    assert "does not answer" in redis.detail
    assert "hunter2" not in redis.detail + redis.advice


def test_a_redis_that_is_too_old_is_broken(findings: Examine) -> None:
    port = free_port()
    with old_redis(port):
        redis = findings(f"redis://127.0.0.1:{port}/0")["redis"]
    assert redis.state == "broken"
    assert "6.2.14" in redis.detail
    assert "7.0 or newer" in redis.advice


def test_a_redis_url_of_another_kind_is_broken(findings: Examine) -> None:
    assert findings("http://127.0.0.1:1")["redis"].state == "broken"


def test_every_tensorrt_names_the_gpus_that_it_covers(findings: Examine) -> None:
    found = findings(None)
    for flavour in FLAVOURS.values():
        for capability, gpus in flavour.gpus.items():
            assert f"{capability} ({gpus})" in found[flavour.name].detail
    assert "9.0" not in found["tensorrt_rtx"].detail


def test_where_onnxruntime_has_no_gpu_the_advice_says_what_to_install(findings: Examine) -> None:
    onnxruntime = findings(None)["onnxruntime"]
    assert ("onnxruntime-gpu" in onnxruntime.advice) == ("CUDA" not in onnxruntime.detail)
