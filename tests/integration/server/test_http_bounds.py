"""Bounds on what comes in, on a real server, with raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from server.auth import new_key
from server.config import HttpConfig
from tests.integration.server.bounded import bounded, listening

HTTP = HttpConfig(
    max_head_bytes=4096,
    max_body_bytes=10_000,
    max_upload_bytes=200_000,
    read_timeout_s=0.5,
    min_upload_bytes_per_s=100_000,
    max_connections=8,
)
KEY = new_key()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(HTTP, bounded(HTTP)) as number:
        yield number


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20.0)


def reply(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Everything until the server closes, which it must."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), fields, body


def refused(sock: socket.socket) -> tuple[int, str]:
    """Status and code of an error in our shape, after which the connection was closed."""
    status, fields, body = reply(sock)
    assert fields["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"type", "code", "message", "param"}
    return status, error["code"]


def post(path: str = "/", *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", *headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


CHUNKED = "Transfer-Encoding: chunked"


def test_what_is_within_the_bounds_passes(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/", content=b"x" * 10_000).json() == {"bytes": 10_000}
        chunks = (b"x" * 1000 for _ in range(200))
        assert client.post("/uploads", content=chunks).json() == {"bytes": 200_000}
        assert client.get("/").json() == {"bytes": 0}


@pytest.mark.parametrize(
    "length", ["10001", "52428800", "99999999999999999999999999999999"], ids=len
)
def test_a_declared_length_over_the_bound_is_refused_unread(port: int, length: str) -> None:
    with connect(port) as sock:
        sock.sendall(post("/", f"Content-Length: {length}"))  # and not a byte of it
        sock.shutdown(socket.SHUT_WR)
        assert refused(sock)[0] in (400, 413)  # past 2**64 it is no HTTP any more


def test_the_bound_is_the_paths_own(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        big = b"x" * 10_001
        assert client.post("/uploads", content=big).status_code == 200
        said = client.post("/", content=big, headers={"content-type": "multipart/form-data"})
        assert said.status_code == 413
        assert "10000 bytes" in said.json()["error"]["message"]


def test_expect_100_continue_is_refused_before_the_body_is_asked_for(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(post("/", "Content-Length: 10001", "Expect: 100-continue"))
        status, _, body = reply(sock)
    assert status == 413
    assert b"100 Continue" not in body


def test_chunks_are_counted_and_the_answer_arrives_while_the_client_still_sends(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        said = client.post("/", content=(b"x" * 1000 for _ in range(1000)))
    assert said.status_code == 413
    assert said.headers["connection"] == "close"


def test_a_50_mb_prompt_is_refused(port: int) -> None:
    body = b'{"prompt": "' + b"a" * (50 << 20) + b'"}'
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/", content=body).status_code == 413


@pytest.mark.parametrize("start", [b"G", b"POST / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_slow_head_ends_with_408(port: int, start: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(start)
        assert refused(sock) == (408, "request_timeout")


def test_a_connection_that_never_speaks_is_closed_without_a_word(port: int) -> None:
    with connect(port) as sock:
        assert sock.recv(1) == b""


@pytest.mark.parametrize("header", ["Content-Length: 5000", CHUNKED])
def test_a_slow_body_ends_with_408(port: int, header: str) -> None:
    with connect(port) as sock:
        sock.sendall(post("/", header) + b"5\r\nhello\r\n")
        assert refused(sock) == (408, "too_slow")


def test_a_body_that_trickles_ends_although_something_always_comes(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(post("/uploads", "Content-Length: 100000"))
        sock.settimeout(0.05)
        answer = b""
        deadline_s = time.monotonic() + 20.0
        while not answer and time.monotonic() < deadline_s:
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: a\r\n" * 2000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000,
    ],
    ids=["url", "value", "many", "endless"],
)
def test_a_large_head_ends_with_431(port: int, head: bytes) -> None:
    with connect(port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(head)
        assert refused(sock) == (431, "request_header_fields_too_large")


def test_trailers_and_chunk_extensions_cannot_go_on_forever(port: int) -> None:
    for endless in (b"0\r\nX-A: ", b"1;"):
        with connect(port) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(post("/", CHUNKED) + endless)
                for _ in range(100):
                    sock.sendall(b"a" * 10_000)
            status, *_ = reply(sock)
        assert status in (400, 431)


def test_what_is_no_http_is_refused_in_our_shape(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00 a TLS hello\r\n\r\n")
        assert refused(sock) == (400, "bad_request")


def test_too_many_connections_are_turned_away(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(port)).sendall(b"G")
        with connect(port) as sock:
            status, fields, _ = reply(sock)
    assert (status, fields["retry-after"]) == (503, "1")


def test_a_body_that_nobody_read_leaves_the_connection_usable(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(post("/early", "Content-Length: 9000"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"x" * 9000 + post("/", "Content-Length: 2") + b"hi")
        assert sock.recv(65536).endswith(b'{"bytes": 2}')


def test_without_a_key_no_body_is_read() -> None:
    with listening(HTTP, bounded(HTTP, KEY.hash)) as port:
        with connect(port) as sock:
            sock.sendall(post("/uploads", "Content-Length: 100000", "Expect: 100-continue"))
            assert refused(sock) == (401, "invalid_api_key")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            said = client.post("/", content=(b"x" * 1000 for _ in range(1000)))
            assert (said.status_code, said.headers["www-authenticate"]) == (401, "Bearer")
            assert client.request("DELETE", "/").status_code == 401
            assert client.get("/").status_code == 200  # the route decides
            headers = {"authorization": f"Bearer {KEY.key}"}
            assert client.post("/", content=b"abc", headers=headers).json() == {"bytes": 3}


def test_two_gigabytes_without_a_key_cost_no_memory() -> None:
    """A client that ignores the answer and sends on and on: the memory stays where it was."""
    command = [sys.executable, "-m", "tests.integration.server.bounded", KEY.hash]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            _request(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            memory = psutil.Process(process.pid).memory_info
            idle_bytes = peak_bytes = memory().rss
            chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            sent = 0
            with connect(port) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(post("/v1/images/edits", CHUNKED))
                while sent < 2 << 30:
                    sock.sendall(chunk)
                    sent += 65536
                    peak_bytes = max(peak_bytes, memory().rss)
            assert peak_bytes - idle_bytes < 50 << 20
            assert sent < 64 << 20  # it was cut off long before
        finally:
            process.kill()


def _request(port: int, data: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(data)
        reply(sock)
