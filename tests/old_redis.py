"""As much of Redis 6.2 as a client sees before it asks for more."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator


class _Commands(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:size].upper())
            if words[0] == b"INFO":
                text = b"# Server\r\nredis_version:6.2.14\r\n"
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(text), text))
            elif words[0] in (b"CLIENT", b"SELECT"):
                self.wfile.write(b"+OK\r\n")
            else:
                self.wfile.write(b"-ERR unknown command\r\n")


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextlib.contextmanager
def old_redis(port: int) -> Iterator[None]:
    """Answer on a port of this machine as Redis 6.2 does, until the block ends.

    Connections that were made go on being answered, as those through a proxy may be.
    """
    with _Server(("127.0.0.1", port), _Commands) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
