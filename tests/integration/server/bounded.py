"""A small application behind the real door, body bounds and listener, on a port of its own."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.ports import SystemClock
from server.auth import KeyRing
from server.config import AuthConfig, HttpConfig, ServeConfig, TenantConfig
from server.listener import uvicorn_config
from server.middleware.body_limit import BodyLimit
from server.middleware.door import Door
from server.rate_limit import RateLimiter

UPLOADS = ("/uploads",)


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body; ``/early`` answers without reading it."""
    total, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        total += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = json.dumps({"bytes": total}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bounded(http: HttpConfig, key_hash: str | None = None) -> ASGIApp:
    tenants = (TenantConfig(id="a", key_hashes=(key_hash,)),) if key_hash else ()
    keys = KeyRing(AuthConfig(tenants=tenants), enabled=bool(key_hash))
    limited = BodyLimit(count, http=http, upload_paths=UPLOADS)
    return Door(limited, keys=keys, limiter=RateLimiter(SystemClock()))


@contextmanager
def listening(http: HttpConfig, app: ASGIApp) -> Iterator[int]:
    """Serve ``app`` in a thread; the port is free again afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn_config(app, http, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10.0)
            assert not thread.is_alive()


def main(key_hash: str) -> None:
    """Serve the whole application, drawing by script, with a key until killed; prints the port."""
    from server.gateway import create_app
    from server.services import open_services
    from tests.unit.server.scripted import ScriptedDispatcher

    tenants = (TenantConfig(id="a", key_hashes=(key_hash,)),)
    config = ServeConfig(auth=AuthConfig(tenants=tenants))
    app = create_app(open_services(config, ScriptedDispatcher()))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn_config(app, config.http)).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
