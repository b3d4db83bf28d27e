"""Redis over TLS with a private authority and client certificates, from the configuration."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import redis

from server.config import RedisConfig, ServeConfig
from server.jobs.redis_client import connect
from server.redis_settings import redis_settings
from tests.redis_server import RedisServer, free_port

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisConfig]:
    """A server that wants client certificates, and how to reach it."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    files = {"ca": certificate, "certificate": certificate, "key": key}
    with RedisServer(
        folder / "redis",
        *("--tls-port", str(port), "--tls-cert-file", str(certificate)),
        *("--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)),
    ):
        url = f"rediss://localhost:{port}/0"
        yield ServeConfig.model_validate(
            {"redis": {"url": url, "timeout_s": 5, "tls": files}}
        ).redis


def test_the_cache_and_operators_reach_it(config: RedisConfig) -> None:
    with redis_settings(config, 5.0).client(5.0) as client:
        assert client.ping()


async def test_jobs_reach_it(config: RedisConfig) -> None:
    assert config.url is not None
    client = connect(config.url, config.timeout_s, config.tls)
    assert await client.ping()
    await client.connection_pool.disconnect()
    await client.aclose()


def test_without_its_authority_nobody_does(config: RedisConfig) -> None:
    with (
        redis_settings(RedisConfig(url=config.url), 5.0).client(5.0) as client,
        pytest.raises(redis.ConnectionError),
    ):
        client.ping()
