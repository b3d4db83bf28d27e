"""Hostile input to a whole application with a key: typed refusals, flat memory, others served."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from server.auth import new_key
from tests.served import Served, darkroom_serve

pytestmark = pytest.mark.full

KEY = new_key()
AUTHORIZED = {"authorization": f"Bearer {KEY.key}"}
READ_TIMEOUT_S = 3.0
SLOW_CLIENTS = 60
MOST_MORE_MB = 50.0
TWO_GB = 2_000_000_000
PART = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
"""A picture begins, in a multipart body whose boundary is ``x``."""


@pytest.fixture(scope="module")
def served(
    tiny_checkpoint: Callable[[str], Path], plans: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with darkroom_serve(
        tiny_checkpoint("text"),
        plans,
        tmp_path_factory.mktemp("hostile") / "home",
        auth={"enabled": True, "tenants": [{"id": "ada", "key_hashes": [KEY.hash]}]},
        http={"read_timeout_s": READ_TIMEOUT_S},
    ) as served:
        for seed in range(8):  # pools and caches fill
            assert draw(served, seed).status_code == 200
        yield served


def draw(served: Served, seed: int) -> httpx.Response:
    body = {"prompt": "a red umbrella", "steps": 4, "seed": seed, "response_format": "b64_json"}
    url = f"{served.url}/v1/images/generations"
    return httpx.post(url, json=body, headers=AUTHORIZED, timeout=60.0)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, in the shape that every client knows."""
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) >= {"type", "code", "message", "param"}
    assert error["message"]
    return error


@contextlib.contextmanager
def flat_memory(served: Served) -> Iterator[None]:
    """Fail when any process of the application is larger afterwards, or was meanwhile."""
    before = _memory_mb(served)
    most = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for pid, memory_mb in _memory_mb(served).items():
                most[pid] = max(most.get(pid, 0.0), memory_mb)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
    grown = {pid: most[pid] - before[pid] for pid in before if most[pid] - before[pid] > 0}
    assert all(more_mb < MOST_MORE_MB for more_mb in grown.values()), grown


def _memory_mb(served: Served) -> dict[int, float]:
    found = {}
    for process in served.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = process.memory_info().rss / 1e6
    return found


@pytest.mark.parametrize("with_key", [False, True])
def test_two_gigabytes_in_chunks_end_early(served: Served, with_key: bool) -> None:
    chunk = b"x" * 65536
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield PART
        while sent < TWO_GB:
            sent += len(chunk)
            yield chunk

    headers = {"content-type": "multipart/form-data; boundary=x"}
    with flat_memory(served):
        try:
            reply = httpx.post(
                f"{served.url}/v1/images/edits",
                content=body(),
                headers=headers | (AUTHORIZED if with_key else {}),
                timeout=60.0,
            )
        except httpx.TransportError:
            pass  # cut off while it was still sending: it has been told enough
        else:
            assert reply.status_code == (413 if with_key else 401)
            error_of(reply)
    assert sent < TWO_GB / 10
    assert draw(served, 1).status_code == 200


def test_a_bomb_among_pictures_is_refused_unpacked(served: Served) -> None:
    bomb = black_png(40_000)
    assert len(bomb) < 1_000_000
    files = {"image": ("bomb.png", bomb, "image/png")}
    with flat_memory(served):
        reply = httpx.post(
            f"{served.url}/v1/images/edits",
            files=files,
            data={"prompt": "a cat"},
            headers=AUTHORIZED,
            timeout=60.0,
        )
    assert reply.status_code in (400, 413, 422)
    assert error_of(reply)["param"] == "image"
    assert "16777216" in error_of(reply)["message"].replace(",", "")


def black_png(side_px: int) -> bytes:
    """A square PNG of one bit a pixel, all black, that unpacks to a hundred times and more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + side_px // 8) * side_px), 9)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_prompt_of_50_mb_is_refused(served: Served) -> None:
    body = json.dumps({"prompt": "a " * 25_000_000}).encode()
    url = f"{served.url}/v1/images/generations"
    headers = AUTHORIZED | {"content-type": "application/json"}
    with flat_memory(served), contextlib.suppress(httpx.WriteError):
        reply = httpx.post(url, content=body, headers=headers, timeout=60.0)
        assert reply.status_code == 413
        error_of(reply)
    assert draw(served, 2).status_code == 200


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\n", id="heads"),
        pytest.param(
            b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000\r\n"
            b"content-type: multipart/form-data; boundary=x\r\nauthorization: Bearer "
            + KEY.key.encode()
            + b"\r\n\r\n"
            + PART,
            id="bodies",
        ),
    ],
)
def test_slow_clients_are_cut_off_and_hold_nobody_up(served: Served, start: bytes) -> None:
    address = urlsplit(served.url)
    assert address.hostname is not None
    assert address.port is not None
    endings: list[bytes] = []
    drip = b"x-drip: 1\r\n" if not start.endswith(b"\r\n\r\n") else b"x"

    def trickle() -> None:
        with socket.create_connection((address.hostname, address.port)) as slow:
            slow.settimeout(0.5)
            slow.sendall(start)
            until_s = time.monotonic() + 20 * READ_TIMEOUT_S
            answer = b""
            while time.monotonic() < until_s:
                try:
                    if not (data := slow.recv(4096)):
                        break
                    answer += data
                except TimeoutError:
                    with contextlib.suppress(OSError):
                        slow.sendall(drip)
                except OSError:
                    break
            else:
                answer = b"still open"
            endings.append(answer)

    with flat_memory(served):
        clients = [threading.Thread(target=trickle) for _ in range(SLOW_CLIENTS)]
        for client in clients:
            client.start()
        assert [draw(served, seed).status_code for seed in range(4)] == [200] * 4
        for client in clients:
            client.join()
    assert len(endings) == SLOW_CLIENTS
    assert {ending.partition(b"\r\n")[0] for ending in endings} == {b"HTTP/1.1 408 Request Timeout"}
