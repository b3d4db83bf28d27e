"""Webhooks: where they may go, how they are signed, and when they are tried again."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Sequence

import httpx
import pytest

from engine.errors import InvalidRequestError
from server.config import JobsConfig
from server.errors import ForbiddenError
from server.jobs.addresses import AllowedHosts, ForbiddenAddressError
from server.jobs.memory import MemoryJobStore
from server.jobs.records import Change, JobState, WebhookTarget
from server.jobs.store import Bounds
from server.jobs.webhooks import Courier, signature, signing_key
from tests.contracts.job_stores import job

PUBLIC = "93.184.215.14"
SECRET = "a secret of the receiver"


# ------------------------------------------------------------------------------ where they may go


@pytest.mark.parametrize(
    ("entries", "url"),
    [
        (["hooks.example.com"], "https://hooks.example.com/x?y=1"),
        (["hooks.example.com"], "http://HOOKS.example.com."),
        (["*.example.com"], "https://a.b.example.com/"),
        (["hooks.example.com:8443"], "https://hooks.example.com:8443/"),
        (["10.1.0.0/16"], "http://10.1.2.3:9000/x"),
        (["::1"], "http://[::1]:9000/x"),
    ],
)
def test_hosts_on_the_list(entries: list[str], url: str) -> None:
    AllowedHosts(entries).check(url)


@pytest.mark.parametrize(
    ("entries", "url"),
    [
        ([], "https://hooks.example.com/"),
        (["hooks.example.com"], "https://example.com/"),
        (["hooks.example.com"], "https://hooks.example.com.evil.example/"),
        (["hooks.example.com"], "https://evilhooks.example.com/"),
        (["hooks.example.com"], "https://hooks.example.com:22/"),
        (["*.example.com"], "https://example.com/"),
        (["*.example.com"], "https://badexample.com/"),
        (["hooks.example.com:8443"], "https://hooks.example.com/"),
        (["*.example.com"], "http://169.254.169.254/latest/meta-data"),
        (["*.example.com"], "http://[::ffff:169.254.169.254]/"),
        (["10.1.0.0/16"], "http://10.2.0.1/"),
        (["hooks.example.com"], "http://2852039166/"),
        (["hooks.example.com"], "http://0x7f.1/"),
    ],
)
def test_hosts_that_are_not(entries: list[str], url: str) -> None:
    with pytest.raises(ForbiddenError, match="webhook_hosts") as caught:
        AllowedHosts(entries).check(url)
    assert caught.value.field == "webhook.url"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "https://",
        "https://user:pass@hooks.example.com/",
        "https://hooks.example.com@evil.example/",
        "https://hooks.example.com/#fragment",
        "https://hooks.example.com\\@evil.example/",
        "https://hooks.example.com/\r\nX-A: b",
        "https://hooks.example.com:99999/",
        "https://[::1/",
        "https://hooks.example.com/" + "a" * 2000,
        "https://hööks.example.com/",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="webhook"):
        AllowedHosts(["hooks.example.com"]).check(url)


@pytest.mark.parametrize("entry", ["https://hooks.example.com", "*", "", "a b", "h:port", "-x"])
def test_a_list_that_cannot_be_meant(entry: str) -> None:
    with pytest.raises(InvalidRequestError, match="webhook_hosts"):
        AllowedHosts([entry])


def resolving(*addresses: str) -> object:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


@pytest.mark.anyio
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "ff02::1",
    ],
)
async def test_a_name_that_leads_inside_is_not_called(address: str) -> None:
    hosts = AllowedHosts(["hooks.example.com"])
    target = hosts.check("https://hooks.example.com/")
    for found in ([address], [PUBLIC, address]):
        with pytest.raises(ForbiddenAddressError):
            await hosts.resolve(target, resolving(*found))  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_a_private_address_needs_its_own_entry() -> None:
    hosts = AllowedHosts(["hooks.internal", "10.0.0.0/8"])
    target = hosts.check("http://hooks.internal/")
    assert await hosts.resolve(target, resolving("10.0.0.7")) == "10.0.0.7"  # type: ignore[arg-type]
    with pytest.raises(ForbiddenAddressError):
        await hosts.resolve(target, resolving("192.168.0.7"))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ how they are sent


class Receiver:
    """Answers with a script of statuses; an exception is raised."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, headers={"location": "http://127.0.0.1/"})


class Bench:
    """A finished job with a webhook, and a courier whose time the test moves."""

    def __init__(self, *answers: int | Exception, attempts: int = 3) -> None:
        self.now_s = 1000.0
        self.receiver = Receiver(*answers)
        self.resolved: list[tuple[str, int]] = []
        self.addresses: list[list[str]] = []
        self.told: list[str] = []
        self.store = MemoryJobStore(Bounds(), now_s=lambda: self.now_s)
        self.courier = Courier(
            self.store,
            JobsConfig(webhook_hosts=("hooks.example.com",), webhook_attempts=attempts),
            now_s=lambda: self.now_s,
            resolve=self.resolve,
            transport=httpx.MockTransport(self.receiver),
            told=self.told.append,
            jitter=lambda: 1.0,
        )

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append((host, port))
        return self.addresses.pop(0) if self.addresses else [PUBLIC]

    async def finish(self, url: str = "https://hooks.example.com/done?a=b") -> None:
        made = job(webhook=WebhookTarget(url=url, secret=SECRET))
        await self.store.create(made)
        ended = JobState(status="succeeded", finished_at_s=1000.0, pictures={"0": {}})
        await self.store.write(made, Change(state=ended))

    async def deliver(self) -> None:
        """Whatever is due now."""
        due = await self.store.due_webhook(60.0)
        if due is not None:
            await self.courier._deliver(*due)


@pytest.mark.anyio
async def test_the_job_is_told_of_and_signed() -> None:
    bench = Bench(204)
    await bench.finish()
    await bench.deliver()
    (request,) = bench.receiver.requests
    assert str(request.url) == f"https://{PUBLIC}/done?a=b"
    assert request.headers["host"] == "hooks.example.com"
    assert request.extensions["sni_hostname"] == "hooks.example.com"
    said = json.loads(request.content)
    assert (said["id"], said["type"], said["pictures"]) == ("j1", "job.succeeded", 1)
    signed = b"j1.1000." + request.content
    digest = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(digest).decode()
    assert request.headers["webhook-signature"] == expected
    assert (request.headers["webhook-id"], request.headers["webhook-timestamp"]) == ("j1", "1000")
    assert SECRET not in str(request.headers) + request.content.decode()
    bench.now_s += 10_000.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 1


def test_the_signature_is_the_standards_own() -> None:
    """The example of the specification of Standard Webhooks."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    said = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert said == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_that_only_looks_encoded_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="base64") as caught:
        signing_key("whsec_not*base64")
    assert "not*base64" not in str(caught.value)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer", [500, 503, 429, 408, httpx.ConnectError("no"), httpx.ReadTimeout("late")]
)
async def test_what_may_pass_is_tried_again_later_and_later(answer: int | Exception) -> None:
    bench = Bench(answer, answer, 200)
    await bench.finish()
    await bench.deliver()
    await bench.deliver()  # not yet
    assert len(bench.receiver.requests) == 1
    bench.now_s += 2.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 2
    bench.now_s += 2.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 2
    bench.now_s += 6.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 3
    assert bench.told == ["retried", "retried", "delivered"]


@pytest.mark.anyio
async def test_it_is_given_up_after_the_configured_attempts() -> None:
    bench = Bench(500, 500, 500, attempts=2)
    await bench.finish()
    for _ in range(5):
        await bench.deliver()
        bench.now_s += 1000.0
    assert len(bench.receiver.requests) == 2
    assert bench.told == ["retried", "given_up"]


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [301, 307, 400, 404, 410])
async def test_what_will_not_pass_is_not_tried_again_and_redirects_are_not_followed(
    answer: int,
) -> None:
    bench = Bench(answer)
    await bench.finish()
    await bench.deliver()
    bench.now_s += 1000.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 1
    assert bench.told == ["given_up"]


@pytest.mark.anyio
async def test_a_name_that_turns_inside_between_two_tries_is_given_up() -> None:
    bench = Bench(503)
    bench.addresses = [[PUBLIC], ["127.0.0.1"]]
    await bench.finish()
    await bench.deliver()
    bench.now_s += 2.0
    await bench.deliver()
    assert len(bench.receiver.requests) == 1  # the address was checked anew
    assert len(bench.resolved) == 2  # and once for each try: nobody resolves it again


@pytest.mark.anyio
async def test_a_host_that_is_no_longer_allowed_is_not_called() -> None:
    bench = Bench(200)
    await bench.finish("https://other.example/")
    await bench.deliver()
    assert bench.receiver.requests == []
    assert bench.told == ["given_up"]


@pytest.mark.anyio
async def test_the_courier_finds_what_is_due() -> None:
    bench = Bench(200)
    await bench.finish()
    await bench.courier.run()
    async with asyncio.timeout(10):
        while not bench.receiver.requests:
            await asyncio.sleep(0)
    await bench.courier.close()
