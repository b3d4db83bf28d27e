"""API keys and the tenants behind them.

A key reads ``dk-<id>-<secret>``: the id finds its hash in one look-up, the secret is 256 bits from
the operating system. The configuration holds only ``blake2b.<id>.<salt>.<digest>``. A fast salted
hash is right here: slow ones (scrypt, argon2) make *guessing* a password dear, and nobody guesses
256 random bits, while hashing slowly on every request would let anyone spend our CPU.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from engine.errors import InvalidRequestError
from server.config import AuthConfig, ServeConfig
from server.errors import ForbiddenError, UnauthenticatedError

ANONYMOUS = "anonymous"
"""The tenant of every request where authentication is off, and an id that no key can have."""

SCOPE_KEY = "darkroom.caller"
"""Where :class:`server.middleware.door.Door` leaves what it found, for :func:`tenant_of`."""

_KEY = re.compile(r"dk-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_HASH = re.compile(r"blake2b\.([0-9a-f]{12})\.([0-9a-f]{32})\.([0-9a-f]{64})")
_PERSON = b"darkroom-key-v1"
_MAX_HEADER_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who asks: what is fair to it, and what it may do.

    Attributes:
        weight: its share of the workers beside other tenants that also wait.
        max_priority: the highest ``priority`` that its requests may name.
        operator: whether it may use operator routes.
        requests_per_minute: of each of its keys; None for no limit.
    """

    id: str
    weight: float = 1.0
    max_priority: int = 0
    operator: bool = False
    requests_per_minute: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant, and which of its keys it used; rates are counted per key."""

    tenant: Tenant
    key_id: str


@dataclass(frozen=True, slots=True)
class NewKey:
    """A fresh key: ``key`` is shown once and given to its user, ``hash`` goes to the config."""

    key: str
    hash: str


def new_key() -> NewKey:
    """Draw a key from the operating system's randomness."""
    key_id = secrets.token_hex(6)
    secret = secrets.token_urlsafe(32)
    salt = secrets.token_bytes(16)
    return NewKey(
        key=f"dk-{key_id}-{secret}",
        hash=f"blake2b.{key_id}.{salt.hex()}.{_digest(secret, salt).hex()}",
    )


class KeyRing:
    """Every configured key's hash, and the tenant that each belongs to.

    Args:
        auth: the tenants of the configuration.
        enabled: whether a key is needed; without, every request is :data:`ANONYMOUS`'s.
        loopback: whether only this machine can connect: then the anonymous tenant is its operator.

    Raises:
        InvalidRequestError: a hash that ``darkroom keys new`` did not print, or a tenant or key
            that is there twice.
    """

    def __init__(self, auth: AuthConfig, *, enabled: bool, loopback: bool = False) -> None:
        self._enabled = enabled
        self._anonymous = Caller(
            Tenant(id=ANONYMOUS, max_priority=10 if loopback else 0, operator=loopback), ANONYMOUS
        )
        self._tenants: dict[str, Tenant] = {}
        self._keys: dict[str, tuple[bytes, bytes, Tenant]] = {}
        for config in auth.tenants:
            tenant = Tenant(
                id=config.id,
                weight=config.weight,
                max_priority=config.max_priority,
                operator=config.operator,
                requests_per_minute=config.requests_per_minute,
            )
            if tenant.id in self._tenants or tenant.id == ANONYMOUS:
                raise _wrong(f"the tenant id {tenant.id!r} is taken")
            self._tenants[tenant.id] = tenant
            for text in config.key_hashes:
                self._add(text, tenant)

    @classmethod
    def of(cls, config: ServeConfig) -> KeyRing:
        """The key ring that ``config`` describes."""
        return cls(config.auth, enabled=config.auth_on, loopback=config.http.loopback)

    @property
    def enabled(self) -> bool:
        """Whether requests need a key."""
        return self._enabled

    def tenants(self) -> tuple[Tenant, ...]:
        """Every tenant that may come in."""
        return tuple(self._tenants.values()) if self._enabled else (self._anonymous.tenant,)

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Whose request this is, by ``Authorization: Bearer`` or ``X-Api-Key``.

        Args:
            headers: of the request, looked up in lower case.

        Raises:
            UnauthenticatedError: no key, one that is not known, or two that differ.
        """
        if not self._enabled:
            return self._anonymous
        found = _KEY.fullmatch(_presented(headers))
        key_id, secret = found.groups() if found else ("", "")
        # An unknown id costs the same hash and comparison as a wrong secret.
        salt, digest, tenant = self._keys.get(key_id, (b"", b"", None))
        same = hmac.compare_digest(_digest(secret, salt), digest)
        if tenant is None or not same:
            raise UnauthenticatedError("the API key is not known")
        return Caller(tenant, key_id)

    def _add(self, text: str, tenant: Tenant) -> None:
        found = _HASH.fullmatch(text)
        if found is None:
            raise _wrong(
                f"tenant {tenant.id!r} has a key hash of another form;"
                " `darkroom keys new` prints one to paste"
            )
        key_id, salt, digest = found.groups()
        if key_id in self._keys:
            raise _wrong(f"tenant {tenant.id!r} has a key that is there already")
        self._keys[key_id] = (bytes.fromhex(salt), bytes.fromhex(digest), tenant)


def tenant_of(request: Request) -> Tenant:
    """FastAPI dependency: the tenant whose request this is.

    Raises:
        UnauthenticatedError: HTTP 401.
    """
    return caller_of(request.scope).tenant


def operator_of(request: Request) -> Tenant:
    """FastAPI dependency: the tenant, which must be an operator.

    Raises:
        UnauthenticatedError: HTTP 401.
        ForbiddenError: HTTP 403.
    """
    tenant = tenant_of(request)
    if not tenant.operator:
        raise ForbiddenError("this route is for operators; the key's tenant is not one")
    return tenant


def observer_of(request: Request) -> Tenant:
    """FastAPI dependency for what may be read and changes nothing: an operator, or anybody where no
    key is needed, so that a scraper in a trusted network needs none either.

    Raises:
        UnauthenticatedError, ForbiddenError: as :func:`operator_of`.
    """
    tenant = tenant_of(request)
    return tenant if tenant.id == ANONYMOUS else operator_of(request)


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """What the door found out about the request; nobody passes a door that is not there."""
    found = scope.get(SCOPE_KEY)
    if isinstance(found, Caller):
        return found
    if isinstance(found, UnauthenticatedError):
        raise found
    raise UnauthenticatedError("the request did not come through the door")


def _presented(headers: Mapping[str, str]) -> str:
    """The key that the headers carry."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme and scheme.lower() != "bearer":
        raise UnauthenticatedError("Authorization must be `Bearer <key>`")
    keys = {key.strip() for key in (bearer, headers.get("x-api-key", "")) if key.strip()}
    if not keys:
        raise UnauthenticatedError(
            "an API key is needed: `Authorization: Bearer <key>` or `X-Api-Key: <key>`"
        )
    if len(keys) > 1:
        raise UnauthenticatedError("Authorization and X-Api-Key carry different keys")
    return keys.pop()[:_MAX_HEADER_CHARS]


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(secret.encode(), digest_size=32, salt=salt, person=_PERSON).digest()


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"auth.tenants: {message}", field="auth.tenants")
