"""Tells others that a job is done: signed, retried, and only where the operator allows.

Signed as https://www.standardwebhooks.com has it: ``webhook-id`` names the job, and
``webhook-signature`` is ``v1,`` and the base64 of HMAC-SHA256 over ``id.timestamp.body`` with the
job's own secret. Delivery is at least once: receivers that count must look at the id.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import httpx

from engine.errors import DarkroomError, InvalidRequestError
from server.config import JobsConfig
from server.jobs.addresses import AllowedHosts, Resolve
from server.jobs.metrics import Delivery
from server.jobs.records import Job, WebhookTarget
from server.jobs.store import JobStore

_log = logging.getLogger(__name__)

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_ENCODED = "whsec_"
_WHOLE_S = 30.0
_BUSY_S = 60.0
_LOOK_S = 1.0
_AT_ONCE = 8
_RETRY_BASE_S = 2.0
_RETRY_MAX_S = 600.0
_TRY_AGAIN = frozenset({408, 425, 429})


def signing_key(secret: str) -> bytes:
    """The bytes that sign: of ``whsec_`` and base64, as libraries write it, else the text itself.

    Raises:
        InvalidRequestError: what follows ``whsec_`` is not base64.
    """
    if not secret.startswith(_ENCODED):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_ENCODED), validate=True)
    except ValueError:
        raise InvalidRequestError(
            f"webhook.secret: what follows {_ENCODED} is not base64", field="webhook.secret"
        ) from None


def signature(secret: str, message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of the ``webhook-signature`` header."""
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    digest = hmac.new(signing_key(secret), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def notice(job: Job) -> dict[str, Any]:
    """What is sent: how the job ended. Its pictures are asked for with the tenant's key."""
    return {
        "type": f"job.{job.state.status}",
        "id": job.spec.id,
        "status": job.state.status,
        "created_at": int(job.spec.created_at_s),
        "finished_at": int(job.state.finished_at_s or 0),
        "pictures": len(job.state.pictures),
        "error": None if job.state.error is None else dict(job.state.error),
    }


class Courier:
    """Delivers the webhooks of a store's finished jobs.

    Args:
        resolve: from (host, port) to addresses; by default the system's resolver.
        transport: of the HTTP client; by default the network.
        told: of what became of each try, for the metrics.
        jitter: from 0 to 1, drawn for each wait, so that receivers that were down are not stormed.
    """

    def __init__(
        self,
        store: JobStore,
        config: JobsConfig,
        *,
        now_s: Callable[[], float],
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        told: Callable[[Delivery], None] = lambda _: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._hosts = AllowedHosts(config.webhook_hosts)
        self._attempts = config.webhook_attempts
        self._now_s = now_s
        self._resolve = resolve
        self._transport = transport
        self._told = told
        self._jitter = jitter
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._sending: set[asyncio.Task[None]] = set()

    def check(self, target: WebhookTarget) -> None:
        """Refuse what would never be called, or cannot be signed.

        Raises:
            InvalidRequestError, ForbiddenError: see :class:`AllowedHosts` and :func:`signing_key`.
        """
        self._hosts.check(target.url)
        signing_key(target.secret)

    async def run(self) -> None:
        """Begin the deliveries that are due; return after a moment."""
        due: tuple[Job, int] | None = None
        await self._slots.acquire()
        try:
            due = await self._store.due_webhook(_BUSY_S)
        finally:
            if due is None:
                self._slots.release()
        if due is None:
            await asyncio.sleep(_LOOK_S)
            return
        sending = asyncio.create_task(self._deliver(*due))
        self._sending.add(sending)
        sending.add_done_callback(self._ended)

    async def close(self) -> None:
        """Stop; what is under way is tried again by another gateway, or after a restart."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._slots.release()

    async def _deliver(self, job: Job, tries: int) -> None:
        """One try."""
        target = job.spec.webhook
        assert target is not None
        outcome: Delivery = "retried"
        try:
            async with asyncio.timeout(_WHOLE_S):
                outcome = await self._post(job, target)
        except DarkroomError as error:
            _log.warning("the webhook of %s is given up: %s", job.spec.id, error)
            outcome = "given_up"
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            _log.info("the webhook of %s failed: %s", job.spec.id, type(error).__name__)
        if outcome == "retried" and tries + 1 >= self._attempts:
            outcome = "given_up"
        self._told(outcome)
        try:
            if outcome == "retried":
                await self._store.put_off_webhook(job.spec.id, self._wait_s(tries))
            else:
                await self._store.settle_webhook(job.spec.id)
        except DarkroomError:
            _log.info("the store is away; the webhook of %s is due again in a while", job.spec.id)

    async def _post(self, job: Job, hook: WebhookTarget) -> Delivery:
        """What became of it; ``retried`` where another try may help."""
        target = self._hosts.check(hook.url)
        address = await self._hosts.resolve(target, self._resolve)
        body = json.dumps(notice(job), separators=(",", ":")).encode()
        timestamp_s = int(self._now_s())
        headers = {
            "host": target.authority,
            "content-type": "application/json",
            "user-agent": "darkroom-webhook/1",
            "webhook-id": job.spec.id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature(hook.secret, job.spec.id, timestamp_s, body),
        }
        request = self._open().build_request(
            "POST",
            target.url_at(address),
            content=body,
            headers=headers,
            # Certificates are checked for the name, although the address is called.
            extensions={"sni_hostname": target.host},
        )
        # Streamed and never read: a receiver's answer is its status.
        answer = await self._open().send(request, stream=True)
        await answer.aclose()
        if answer.is_success:
            return "delivered"
        _log.info("the webhook of %s was answered with %d", job.spec.id, answer.status_code)
        passing = answer.is_server_error or answer.status_code in _TRY_AGAIN
        return "retried" if passing else "given_up"

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=_TIMEOUT,
                follow_redirects=False,
                trust_env=False,  # no proxies: they would resolve the name anew
                transport=self._transport,
                limits=httpx.Limits(max_connections=_AT_ONCE, max_keepalive_connections=0),
            )
        return self._client

    def _wait_s(self, tries: int) -> float:
        return min(_RETRY_MAX_S, _RETRY_BASE_S * 4.0**tries) * (0.5 + 0.5 * self._jitter())
