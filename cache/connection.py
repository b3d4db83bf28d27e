"""How to reach a Redis: settings, a client that never retries by itself, and when to try again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from engine.errors import DarkroomError, InvalidRequestError

MIN_VERSION = (7, 0)
_SCHEMES = ("redis", "rediss", "unix")


class IncompatibleServerError(DarkroomError):
    """The server that answers is older than what the scripts need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """Where Redis is and how long to wait for it.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user and password where needed.
        timeout_s: of one call from a request or the writer; a call is never repeated.
        probe_timeout_s: of the background thread's calls, which nobody waits for.
        tls_ca, tls_certificate, tls_key: for ``rediss://`` with a private authority or with
            client certificates.
        tls_check_hostname: off only for tests of certificates without names.

    Raises:
        InvalidRequestError: at construction, naming the field; the URL itself is not repeated,
            for it may hold a password.
    """

    url: str = field(repr=False)
    timeout_s: float = 0.05
    probe_timeout_s: float = 1.0
    max_connections: int = 8
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_check_hostname: bool = True

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in _SCHEMES:
            raise InvalidRequestError(
                f"the Redis URL must begin with one of {', '.join(f'{s}://' for s in _SCHEMES)}",
                field="redis.url",
            )
        if not (self.timeout_s > 0 and self.probe_timeout_s > 0 and self.max_connections >= 1):
            raise InvalidRequestError(
                "timeout_s and probe_timeout_s must be above 0, max_connections 1 or more",
                field="redis.timeout_s",
            )

    def client(self, timeout_s: float) -> redis.Redis:
        """A client with a pool of its own; connects at its first command, not here."""
        tls: dict[str, object] = {}
        if urlsplit(self.url).scheme == "rediss":
            tls["ssl_check_hostname"] = self.tls_check_hostname
            for name, path in (
                ("ssl_ca_certs", self.tls_ca),
                ("ssl_certfile", self.tls_certificate),
                ("ssl_keyfile", self.tls_key),
            ):
                if path is not None:
                    tls[name] = str(path)
        pool = redis.BlockingConnectionPool.from_url(
            self.url,
            max_connections=self.max_connections,
            timeout=timeout_s,  # for a free connection
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            **tls,
        )
        return redis.Redis(connection_pool=pool)


def check_version(client: redis.Redis) -> None:
    """Refuse a server that cannot run the scripts.

    Raises:
        IncompatibleServerError: naming the version found and the one needed.
    """
    found = str(client.info("server").get("redis_version", "unknown"))
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < MIN_VERSION:
        raise IncompatibleServerError(
            f"this is Redis {found}; the noise cache needs {'.'.join(map(str, MIN_VERSION))}"
            " or newer"
        )


class Backoff:
    """Delays that double with every failure, up to a bound, with jitter so that workers that lost
    the same server do not all come back at once.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.1,
        most_s: float = 5.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._jitter = jitter
        self._failures = 0

    def failed(self) -> float:
        """Count a failure; says how many seconds to wait before the next try."""
        delay_s = min(self._most_s, self._first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return delay_s * (0.5 + 0.5 * self._jitter())

    def succeeded(self) -> None:
        """Start over."""
        self._failures = 0
