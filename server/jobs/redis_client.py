"""The connection to Redis, the names of its keys, and its ways of not answering."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from engine.errors import InvalidRequestError
from server.config import RedisTlsConfig
from server.errors import JobsUnavailableError

_log = logging.getLogger(__name__)

SCHEMA = "v1"
"""Part of every key: gateways of another schema see none of these jobs."""
_CONNECTIONS = 32


def key(kind: str, *parts: str) -> str:
    """The one place where names of keys are made. The braces keep them in one slot of a cluster."""
    return ":".join(("darkroom", "{jobs}", SCHEMA, kind, *parts))


def connect(url: str, timeout_s: float, tls: RedisTlsConfig | None = None) -> Any:
    """A client with a bounded pool; it connects at its first use.

    Typed as anything: its own types are unions of every form that a reply could have.

    Args:
        timeout_s: of each call, connecting included; it is tried at most three times.
        tls: of a ``rediss://`` address; others ignore it.

    Raises:
        InvalidRequestError: no address of a Redis. It may hold a password, so it is not shown.
    """
    options = (tls or RedisTlsConfig()).options() if url.startswith("rediss://") else {}
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            **options,
        )
    except ValueError:
        raise InvalidRequestError(
            "redis.url must be redis://, rediss:// or unix:// with a host or path",
            field="redis.url",
        ) from None
    return Redis(connection_pool=pool)


@contextmanager
def answering() -> Iterator[None]:
    """Redis' many ways of not answering, as one error.

    Raises:
        JobsUnavailableError: instead of any of them.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        _log.warning("the store of jobs does not answer: %s", type(error).__name__)
        raise JobsUnavailableError("the store of jobs does not answer; try again") from error
