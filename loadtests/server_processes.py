"""A server under test: started, waited for, its processes' CPU time read, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RunningServer:
    """A server and all that it has started."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._process = psutil.Process(process.pid)

    @property
    def root(self) -> psutil.Process:
        """The process that was started."""
        return self._process

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by what the process is; those of one kind added up."""
        seconds: dict[str, float] = {}
        for process in [self._process, *self._process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                kind = kind_of(process.cmdline())
                seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
        return seconds

    def memory_mb(self) -> float:
        """Proportional memory of all processes in MB (10⁶ bytes): shared pages counted once."""
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 1e6


def cpu_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds spent between two readings, largest first."""
    spent = {kind: seconds - before.get(kind, 0.0) for kind, seconds in after.items()}
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


@contextlib.contextmanager
def serving(
    command: Sequence[str], url: str, *, ready: str, environment: Mapping[str, str]
) -> Iterator[RunningServer]:
    """Run a server while the block does.

    Args:
        ready: path that answers 200 once requests may come.
        environment: laid over this process's own.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has its last output.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            if not _wait(process, url + ready):
                log.seek(0)
                tail = log.read()[-4000:].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} did not get ready:\n{tail}")
            yield RunningServer(url, process)
        finally:
            _stop(process)


@contextlib.contextmanager
def serving_darkroom(model: Path, *, threads: int, **sections: Any) -> Iterator[RunningServer]:
    """Run ``darkroom serve`` around one model, on a free port, while the block does.

    Args:
        model: the checkpoint's folder; its name is the model's id.
        threads: of the worker.
        sections: of the configuration, beside those.

    Raises:
        RuntimeError: as :func:`serving`.
    """
    port = free_port()
    content = {
        "models": [{"id": model.name, "path": str(model)}],
        "http": {"port": port},
        "workers": {"threads": threads},
        **sections,
    }
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "darkroom.yaml"
        config.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "server", "serve", "--config", str(config)]
        url = f"http://127.0.0.1:{port}"
        with serving(command, url, ready="/readyz", environment={"HF_HUB_OFFLINE": "1"}) as server:
            yield server


def _wait(process: subprocess.Popen[bytes], url: str) -> bool:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5.0).status_code == 200:
                return True
        time.sleep(0.25)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask for an end, and see to it that none of the server's processes outlives it."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5.0)
    for orphan in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()


def kind_of(command: Sequence[str]) -> str:
    """What a process is, from its command line: Ray names its replicas there."""
    line = " ".join(command)
    for word in ("Gateway", "Router", "Worker", "ServeController"):
        if line.startswith("ray::") and word in line:
            return word.lower().replace("servecontroller", "serve controller")
    for word in ("raylet/raylet", "gcs_server"):
        if word in line:
            return word.rpartition("/")[2]
    if line.startswith("ray::") or "/ray/" in line:
        return "other ray processes"
    return "multiprocessing" if "multiprocessing" in line else "server"
