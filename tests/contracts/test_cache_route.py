"""``/v1/cache`` and ``darkroom cache``: the same of Redis as of the memory of two workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from cache.connection import RedisSettings
from cache.memory import MemoryNoiseCache
from cache.redis import RedisNoiseCache
from engine.errors import BackendUnavailableError, InvalidRequestError
from engine.ports import NoiseCache
from server.cli import app
from server.config import ServeConfig
from server.errors import ServerError
from server.gateway import create_app
from server.services import open_services
from tests.noise import charged_bytes, key, offer
from tests.redis_server import RedisServer
from tests.unit.server.scripted import MODEL, ScriptedDispatcher
from tests.unit.server.served import served

WEIGHTS = MODEL.checkpoint
OLD = "0" * 64
"""Weights that no model has any more."""
PICTURE_BYTES = charged_bytes(offer(1))
LIMIT_BYTES = 2**20

HELD: tuple[tuple[str | None, str, int], ...] = (
    ("ada", WEIGHTS, 1),
    ("ada", WEIGHTS, 2),
    ("ada", OLD, 3),
    ("bob", WEIGHTS, 4),
    (None, WEIGHTS, 5),
)
"""(tenant, checkpoint, number of the picture), each with two states."""


@dataclass
class Backend:
    """A server over caches that hold ``HELD``; in memory it is spread over two workers."""

    config: ServeConfig
    dispatcher: ScriptedDispatcher
    caches: tuple[NoiseCache, ...]

    @property
    def in_memory(self) -> bool:
        return self.config.redis.url is None

    def client(self) -> TestClient:
        return TestClient(create_app(open_services(self.config, self.dispatcher)))

    def settle(self) -> None:
        for cache in self.caches:
            if isinstance(cache, RedisNoiseCache):
                cache.sync()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    config: dict[str, Any] = {"cache": {"max_bytes": LIMIT_BYTES}}
    dispatcher = ScriptedDispatcher()
    caches: tuple[NoiseCache, ...]
    if request.param == "redis":
        url = request.getfixturevalue("server").url
        with redis.Redis.from_url(url) as client:
            client.flushall()
        config["redis"] = {"url": url}
        shared = RedisNoiseCache(
            RedisSettings(url=url, timeout_s=5.0), limit_bytes=LIMIT_BYTES, poll_s=0.01
        )
        shared.sync()
        caches = (shared, shared)
    else:
        caches = (
            MemoryNoiseCache(limit_bytes=LIMIT_BYTES),
            MemoryNoiseCache(limit_bytes=LIMIT_BYTES),
        )
        dispatcher.caches = {f"worker-{i}": cache for i, cache in enumerate(caches)}
    for tenant, checkpoint, number in HELD:
        cache = caches[number % 2]
        assert cache.offer(key(tenant, checkpoint=checkpoint), offer(number))
    made = Backend(ServeConfig.model_validate(config), dispatcher, caches)
    made.settle()
    yield made
    for cache in caches:
        cache.close()


def held(report: dict[str, Any]) -> dict[tuple[str | None, str], tuple[int, int, int]]:
    return {
        (share["tenant"], share["checkpoint"]): (share["entries"], share["states"], share["bytes"])
        for share in report["shares"]
    }


def pictures(count: int) -> tuple[int, int, int]:
    return count, 2 * count, count * PICTURE_BYTES


ALL = {
    ("ada", WEIGHTS): pictures(2),
    ("ada", OLD): pictures(1),
    ("bob", WEIGHTS): pictures(1),
    (None, WEIGHTS): pictures(1),
}


def test_an_operator_sees_every_tenants_share_of_every_model(backend: Backend) -> None:
    report = backend.client().get("/v1/cache").json()
    assert held(report) == ALL
    assert (report["entries"], report["states"], report["bytes"]) == pictures(5)
    assert report["limit_bytes"] == LIMIT_BYTES
    models = {share["checkpoint"]: share["models"] for share in report["shares"]}
    assert models == {WEIGHTS: [MODEL.id], OLD: []}
    assert all(share["best"] == [] for share in report["shares"])
    assert report["missing"] == []
    if backend.in_memory:
        assert report["backend"] == "memory"
        assert report["workers"] == [
            {"worker": "worker-0", "entries": 2, "states": 4, "bytes": 2 * PICTURE_BYTES},
            {"worker": "worker-1", "entries": 3, "states": 6, "bytes": 3 * PICTURE_BYTES},
        ]
        # ada's pictures are one in each worker: together they may grow to twice the limit.
        assert {share["limit_bytes"] for share in report["shares"]} == {2 * LIMIT_BYTES}
    else:
        assert (report["backend"], report["workers"]) == ("redis", [])
        assert {share["limit_bytes"] for share in report["shares"]} == {LIMIT_BYTES}


@pytest.mark.parametrize(
    ("query", "meant"),
    [
        ({"tenant": "ada"}, {("ada", WEIGHTS), ("ada", OLD)}),
        ({"model": MODEL.id}, {("ada", WEIGHTS), ("bob", WEIGHTS), (None, WEIGHTS)}),
        ({"tenant": "ada", "model": MODEL.id}, {("ada", WEIGHTS)}),
        ({"checkpoint": OLD}, {("ada", OLD)}),
        ({"shared": True}, {(None, WEIGHTS)}),
        ({"everything": True}, set(ALL)),
        ({"tenant": "nobody"}, set()),
    ],
)
def test_what_is_cleared_is_gone_from_all_workers_and_told(
    backend: Backend, query: dict[str, Any], meant: set[tuple[str | None, str]]
) -> None:
    client = backend.client()
    looked = {name: value for name, value in query.items() if name != "everything"}
    chosen = {name: sizes for name, sizes in ALL.items() if name in meant}
    assert held(client.get("/v1/cache", params=looked).json()) == chosen
    cleared = client.delete("/v1/cache", params=query).json()
    assert held(cleared) == chosen
    told = (cleared["entries"], cleared["states"], cleared["bytes"])
    assert told == pictures(sum(entries for entries, _, _ in chosen.values()))
    left = {name: sizes for name, sizes in ALL.items() if name not in meant}
    assert held(client.get("/v1/cache").json()) == left
    backend.settle()
    for tenant, checkpoint, number in HELD:
        cache = backend.caches[number % 2]
        about, asked = key(tenant, checkpoint=checkpoint), offer(number).embedding
        assert asked is not None
        found = cache.nearest(about, asked, claim="", limit=1)
        assert bool(found) == ((tenant, checkpoint) in left)


def test_the_best_states_are_shown_where_asked_for(backend: Backend) -> None:
    report = backend.client().get("/v1/cache", params={"best": 3, "tenant": "ada"}).json()
    [both, one] = (share["best"] for share in report["shares"])
    assert (len(both), len(one)) == (3, 2)
    scores = [state["score"] for state in both]
    assert scores == sorted(scores, reverse=True)
    workers = {state["worker"] for state in both}
    assert workers == ({"worker-0", "worker-1"} if backend.in_memory else {None})
    assert {state["kind"] for state in both} == {"clean"}


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({}, 400, "tenant"),
        ({"tenant": "ada", "everything": True}, 400, "tenant"),
        ({"model": MODEL.id, "everything": True}, 400, "tenant"),
        ({"tenant": "ada", "shared": True}, 400, "tenant"),
        ({"model": MODEL.id, "checkpoint": OLD}, 400, "model"),
        ({"checkpoint": "12ab"}, 400, "checkpoint"),
        ({"model": "unheard-of"}, 404, "model"),
    ],
)
def test_what_is_not_clearly_said_clears_nothing(
    backend: Backend, query: dict[str, Any], status: int, param: str
) -> None:
    client = backend.client()
    refused = client.delete("/v1/cache", params=query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    assert held(client.get("/v1/cache").json()) == ALL


def test_a_worker_that_is_silent_is_named_and_not_taken_for_cleared(backend: Backend) -> None:
    backend.dispatcher.caches["worker-2"] = None
    client = backend.client()
    report = client.get("/v1/cache").json()
    cleared = client.delete("/v1/cache", params={"everything": True})
    if not backend.in_memory:  # no worker is asked
        assert (report["missing"], cleared.status_code) == ([], 200)
        return
    assert report["missing"] == ["worker-2"]
    assert held(report) == ALL
    assert cleared.status_code == 503
    error = cleared.json()["error"]
    assert error["code"] == "cache_unavailable"
    assert "worker-2" in error["message"]


def test_a_redis_that_is_gone_is_told(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        config = ServeConfig.model_validate({"redis": {"url": server.url}})
        server.kill()
        client = TestClient(create_app(open_services(config, ScriptedDispatcher())))
        for reply in (client.get("/v1/cache"), client.delete("/v1/cache?everything=true")):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "cache_unavailable"


def test_without_a_cache_there_is_nothing_to_clear() -> None:
    config = ServeConfig.model_validate({"cache": {"enabled": False}})
    client = TestClient(create_app(open_services(config, ScriptedDispatcher())))
    report = client.get("/v1/cache").json()
    assert (report["backend"], report["shares"], report["states"]) == ("off", [], 0)
    assert client.delete("/v1/cache?everything=true").status_code == 422


def test_only_operators_may_look() -> None:
    from server.auth import new_key

    user, operator = new_key(), new_key()
    config = ServeConfig.model_validate(
        {
            "auth": {
                "tenants": [
                    {"id": "ada", "key_hashes": [user.hash]},
                    {"id": "ops", "key_hashes": [operator.hash], "operator": True},
                ]
            }
        }
    )
    client = TestClient(create_app(open_services(config, ScriptedDispatcher())))
    assert client.get("/v1/cache").status_code == 401
    as_user = {"authorization": f"Bearer {user.key}"}
    assert client.get("/v1/cache", headers=as_user).status_code == 403
    assert client.delete("/v1/cache?everything=true", headers=as_user).status_code == 403
    as_operator = {"authorization": f"Bearer {operator.key}"}
    assert client.get("/v1/cache", headers=as_operator).status_code == 200


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def darkroom(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Runs ``darkroom cache``: of Redis by its configuration, of memory by the server's address."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DARKROOM_REDIS_URL", raising=False)
    file = tmp_path / "darkroom.yaml"
    content = backend.config.model_dump(mode="json", include={"cache"})
    if not backend.in_memory:
        content["redis"] = {"url": backend.config.redis.url}
    file.write_text(yaml.safe_dump(content))
    with served(backend.dispatcher, backend.config) as url:

        def run(command: str, *words: str) -> str:
            where = ["--url", url] if backend.in_memory else []
            asked = ["cache", command, *words, "--config", str(file), *where]
            result = CliRunner().invoke(app, asked)
            if result.exception is not None:
                raise result.exception
            return result.output

        yield run


def test_the_command_says_the_same(backend: Backend, darkroom: Callable[..., str]) -> None:
    said = darkroom("stats")
    assert f"{2 * PICTURE_BYTES:,}" in said
    assert "(shared)" in said
    assert f"10 states, {5 * PICTURE_BYTES:,} bytes" in said
    assert ("the sum of 2 workers" in said) == backend.in_memory
    said = darkroom("inspect", "ada", "--model", OLD)
    assert "e3.0" in said
    assert "e1.0" not in said


def test_the_command_clears(backend: Backend, darkroom: Callable[..., str]) -> None:
    with pytest.raises(InvalidRequestError, match="--all"):
        darkroom("clear")
    with pytest.raises(InvalidRequestError, match="--all"):
        darkroom("clear", "--all", "--tenant", "ada")
    assert "4 states of 2 pictures" in darkroom("clear", "--tenant", "ada", "--model", WEIGHTS)
    assert held(backend.client().get("/v1/cache").json()) == {
        name: sizes for name, sizes in ALL.items() if name != ("ada", WEIGHTS)
    }
    assert "2 states forgotten" in darkroom("clear", "--shared")
    assert "4 states forgotten" in darkroom("clear", "--all")
    unheard_of = ServerError if backend.in_memory else InvalidRequestError
    with pytest.raises(unheard_of, match=r"no (such )?model"):
        darkroom("clear", "--model", "unheard-of")


def test_without_redis_and_without_a_server_the_command_says_so(tmp_path: Path) -> None:
    file = tmp_path / "darkroom.yaml"
    file.write_text("{}")
    words = ["cache", "stats", "--config", str(file), "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, BackendUnavailableError)
