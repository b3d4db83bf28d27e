"""The Redis of a configuration, for the noise cache and for jobs alike."""

from __future__ import annotations

from cache.connection import RedisSettings
from server.config import RedisConfig


def redis_settings(config: RedisConfig, timeout_s: float) -> RedisSettings:
    """How to reach it. Connects to nothing yet.

    Args:
        timeout_s: of one call.

    Raises:
        InvalidRequestError: its URL is none of a Redis.
    """
    assert config.url is not None
    tls = config.tls
    return RedisSettings(
        url=config.url,
        timeout_s=timeout_s,
        tls_ca=tls.ca,
        tls_certificate=tls.certificate,
        tls_key=tls.key,
        tls_check_hostname=tls.check_hostname,
    )
