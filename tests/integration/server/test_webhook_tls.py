"""A webhook over real TLS: the address is called, and the certificate is the name's."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.config import JobsConfig
from server.jobs.memory import MemoryJobStore
from server.jobs.records import Change, JobState, WebhookTarget
from server.jobs.store import Bounds
from server.jobs.webhooks import Courier
from tests.contracts.job_stores import job

pytestmark = pytest.mark.anyio


def certificate(folder: Path, name: x509.GeneralName) -> Path:
    """A self-signed certificate for ``name``, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "cert.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@asynccontextmanager
async def receiver(certificate_path: Path, heads: list[bytes]) -> AsyncIterator[int]:
    """A TLS server that answers 204; the port it listens on."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_path)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def resolve(host: str, port: int) -> Sequence[str]:
    assert host == "hooks.internal"
    return ["127.0.0.1"]


@pytest.mark.parametrize(
    ("name", "arrives"),
    [
        (x509.DNSName("hooks.internal"), True),
        (x509.DNSName("other.internal"), False),
        (x509.IPAddress(ipaddress.ip_address("127.0.0.1")), False),
    ],
    ids=["its-own", "another-name", "the-address"],
)
async def test_the_certificate_must_be_the_hosts(
    tmp_path: Path, name: x509.GeneralName, arrives: bool
) -> None:
    path = certificate(tmp_path, name)
    heads: list[bytes] = []
    async with receiver(path, heads) as port:
        config = JobsConfig(webhook_hosts=(f"hooks.internal:{port}", "127.0.0.0/8"))
        store = MemoryJobStore(Bounds(), now_s=lambda: 1000.0)
        trust = ssl.create_default_context(cafile=str(path))
        courier = Courier(
            store,
            config,
            now_s=lambda: 1000.0,
            resolve=resolve,
            transport=httpx.AsyncHTTPTransport(verify=trust),
        )
        hook = WebhookTarget(url=f"https://hooks.internal:{port}/done", secret="s" * 16)
        made = job(webhook=hook)
        await store.create(made)
        ended = JobState(status="succeeded", finished_at_s=1000.0)
        await store.write(made, Change(state=ended))
        due = await store.due_webhook(60.0)
        assert due is not None
        async with asyncio.timeout(30):
            await courier._deliver(*due)
        await courier.close()
    assert bool(heads) is arrives
    if arrives:
        assert heads[0].startswith(b"POST /done HTTP/1.1\r\n")
        assert f"host: hooks.internal:{port}\r\n".encode() in heads[0].lower()
