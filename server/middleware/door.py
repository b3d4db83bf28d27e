"""The door: who is it, and how often; decided before any of a body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import SCOPE_KEY, Caller, KeyRing
from server.errors import RateLimitedError, UnauthenticatedError
from server.middleware.refusal import brings_body, refuse
from server.rate_limit import RateLimiter
from server.request_log import record_of

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PROBES = frozenset({"/healthz", "/readyz", "/-/healthz", "/-/routes"})
"""A probe that is refused takes a healthy server out of service: no rate counts these."""


class Door:
    """Identifies the caller and counts the request against its key's rate.

    Whatever brings a body or could change something needs a key. Requests that only look pass
    without one: routes that are not for everybody ask for :func:`server.auth.tenant_of`, which
    answers with what was found here.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, limiter: RateLimiter) -> None:
        self._app = app
        self._keys = keys
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found = self._identify(scope)
        scope[SCOPE_KEY] = found
        if isinstance(found, Caller):
            record_of(scope).tenant = found.tenant.id
            try:
                if scope["path"] not in _PROBES:
                    self._limiter.take(found.key_id, found.tenant.requests_per_minute)
            except RateLimitedError as error:
                await refuse(scope, receive, send, error)
                return
        elif scope["method"] not in _SAFE or brings_body(scope):
            await refuse(scope, receive, send, found)
            return
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> Caller | UnauthenticatedError:
        try:
            return self._keys.identify(Headers(scope=scope))
        except UnauthenticatedError as error:
            return error
