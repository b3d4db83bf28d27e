"""``darkroom serve`` as a real process, its replicas as targets, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import yaml

from tests.redis_server import free_port
from tests.serving import MODEL

START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 120.0
Role = Literal["Gateway", "Router", "Worker"]


class Served:
    """A running application."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._process = process
        self._log = log
        self.url = url

    def family(self) -> list[psutil.Process]:
        """The process that was started, and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def replicas(self, role: Role) -> list[psutil.Process]:
        """The processes of a deployment, the oldest first."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and f":darkroom:{role}" in title:
                    found.append(process)
        return sorted(found, key=lambda process: float(process.create_time()))

    def kill(self, role: Role) -> None:
        """SIGKILL to the oldest replica of a deployment."""
        self.replicas(role)[0].kill()

    def ready(self) -> bool:
        """Whether the application says so."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        return False

    def metric(self, name: str) -> float:
        """The sum of a metric over replicas and labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).text
        samples = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        assert samples, f"{name} is not on the page"
        return sum(float(line.rpartition(" ")[2]) for line in samples)

    def terminate(self) -> None:
        """SIGTERM, as an operator sends it."""
        self._process.send_signal(signal.SIGTERM)

    def status(self) -> int:
        """The exit status, once it has ended."""
        return self._process.wait(STOP_TIMEOUT_S)

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")


def wait_until(what: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Look again and again, and fail when it does not come."""
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.1)


@contextlib.contextmanager
def darkroom_serve(
    checkpoint: Path, plans: Path, folder: Path, *flags: str, **sections: Any
) -> Iterator[Served]:
    """Run ``darkroom serve`` around a tiny model until the block ends, however it ends.

    Args:
        plans: store in which the model's plan is compiled, or found.
        folder: for the configuration and the log.
        sections: of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans").symlink_to(plans)
    port = free_port()
    http = {"port": port, **sections.pop("http", {})}
    models = [{"id": MODEL, "path": str(checkpoint)}]
    config = folder / "darkroom.yaml"
    config.write_text(yaml.safe_dump({"models": models, "http": http, **sections}))
    log = folder / "log"
    # Ray's sockets need a short path, and what a killed session leaves is to go with the test.
    scratch = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    environment = {
        **os.environ,
        "DARKROOM_HOME": str(folder),
        "DARKROOM_THREADS": "1",
        "TMPDIR": scratch,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--config", str(config), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    served = Served(process, f"http://127.0.0.1:{port}", log)
    family: list[psutil.Process] = []
    try:
        _wait_for_start(process, served)
        family = served.family()
        yield served
    finally:
        family = list({*family, *served.family()})
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=10.0)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_start(process: subprocess.Popen[bytes], served: Served) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while "ready on" not in served.log():
        if process.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"darkroom serve did not come up:\n{served.log()[-4000:]}")
        time.sleep(0.1)
