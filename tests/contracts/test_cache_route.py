"""``/v1/cache`` on a real Redis, in the workers' memory, and without either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from cache.connection import RedisSettings
from cache.redis import RedisNoiseCache
from server.config import ServeConfig
from server.gateway import create_app
from server.services import open_services
from tests.noise import key, offer
from tests.redis_server import RedisServer
from tests.unit.server.scripted import ScriptedDispatcher

PAGE = b"""# HELP darkroom_cache_bytes Bytes of stored states.
# TYPE darkroom_cache_bytes gauge
darkroom_cache_bytes{backend="memory",policy="lcbfu"} 4096.0
# HELP darkroom_cache_states Stored states.
# TYPE darkroom_cache_states gauge
darkroom_cache_states{backend="memory",policy="lcbfu"} 3.0
"""


def client_of(**config: object) -> TestClient:
    served = ServeConfig.model_validate(config)
    pages = (("worker-1", PAGE), ("router", b"# TYPE other gauge\nother 1.0\n"))
    services = open_services(served, ScriptedDispatcher(pages=pages))
    return TestClient(create_app(services))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


def test_an_operator_sees_and_clears_every_tenants_share(server: RedisServer) -> None:
    cache = RedisNoiseCache(RedisSettings(url=server.url, timeout_s=5.0))
    cache.sync()
    for tenant in ("ada", "bob", None):
        assert cache.offer(key(tenant), offer(1))
    cache.sync()
    client = client_of(redis={"url": server.url})
    found = client.get("/v1/cache").json()
    assert found["backend"] == "redis"
    assert {share["tenant"]: share["states"] for share in found["shares"]} == {
        "ada": 2,
        "bob": 2,
        None: 2,
    }
    assert all(0 < share["bytes"] <= found["limit_bytes"] for share in found["shares"])
    assert client.delete("/v1/cache", params={"tenant": "ada"}).json() == {"states": 2}
    left = {s["tenant"]: s["states"] for s in client.get("/v1/cache").json()["shares"]}
    assert left == {"ada": 0, "bob": 2, None: 2}
    assert client.delete("/v1/cache", params={"shared": True}).json() == {"states": 2}
    assert client.delete("/v1/cache", params={"everything": True}).json() == {"states": 2}
    for params in ({}, {"tenant": "ada", "everything": "true"}):
        refused = client.delete("/v1/cache", params=params)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tenant"
    server.kill()
    lost = client.get("/v1/cache")
    assert lost.status_code == 503
    assert lost.json()["error"]["code"] == "cache_unavailable"
    cache.close()


def test_in_memory_every_worker_says_what_it_holds() -> None:
    client = client_of()
    found = client.get("/v1/cache").json()
    assert (found["backend"], found["shares"]) == ("memory", [])
    assert found["workers"] == [{"worker": "worker-1", "states": 3, "bytes": 4096}]
    refused = client.delete("/v1/cache", params={"everything": True})
    assert refused.status_code == 422
    assert client_of(cache={"enabled": False}).get("/v1/cache").json()["backend"] == "off"


def test_only_operators_may_look() -> None:
    from server.auth import new_key

    user, operator = new_key(), new_key()
    client = client_of(
        auth={
            "tenants": [
                {"id": "ada", "key_hashes": [user.hash]},
                {"id": "ops", "key_hashes": [operator.hash], "operator": True},
            ]
        }
    )
    assert client.get("/v1/cache").status_code == 401
    as_user = {"authorization": f"Bearer {user.key}"}
    assert client.get("/v1/cache", headers=as_user).status_code == 403
    assert client.delete("/v1/cache?everything=true", headers=as_user).status_code == 403
    as_operator = {"authorization": f"Bearer {operator.key}"}
    assert client.get("/v1/cache", headers=as_operator).status_code == 200
