"""``darkroom serve --address`` on a Ray cluster of two machines, as an operator starts it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import yaml

from tests.faults.netns import Machine, two_machines

ROOT = Path(__file__).resolve().parents[2]
PORT = 8000
GCS_PORT = 6379
START_TIMEOUT_S = 300.0
_TRY_AGAIN_S = 1.0


class Cluster:
    """A head, a second node, and the application on both; each with a worker.

    A node whose ``ray start`` ends is started again, as systemd or a kubelet does.

    Args:
        folder: for the configuration and the logs.
        home: ``DARKROOM_HOME`` of all.
    """

    def __init__(self, head: Machine, node: Machine, folder: Path, home: Path) -> None:
        self.head = head
        self.node = node
        self.url = f"http://{head.address}:{PORT}"
        self.node_starts = 0
        self._folder = folder
        # Ray's sockets need a short path.
        self._scratch = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
        token = Path(self._scratch) / "token"
        token.write_text(secrets.token_hex(32))
        self._environment = {
            **os.environ,
            **ray_environment(),
            "DARKROOM_HOME": str(home),
            "DARKROOM_THREADS": "1",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": self._scratch,
            "TMPDIR": self._scratch,
        }
        self._ending = threading.Event()
        self._keeping = threading.Thread(target=self._keep_node)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self._driver: subprocess.Popen[bytes] | None = None

    def start(self, **sections: Any) -> None:
        """Start both nodes and the application; return when it is ready."""
        self._ray("head", self.head, "--head", f"--port={GCS_PORT}", "--include-dashboard=false")
        self._keeping.start()
        config = self._folder / "darkroom.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "http": {"host": "0.0.0.0", "port": PORT},
                    "auth": {"enabled": False},
                    "workers": {"replicas": 2, "threads": 1, **sections.pop("workers", {})},
                    **sections,
                }
            )
        )
        self._driver = self._spawn(
            "serve",
            self.head,
            *(sys.executable, "-m", "server", "serve", "--config", str(config)),
            *("--address", f"{self.head.address}:{GCS_PORT}"),
        )
        until_s = time.monotonic() + START_TIMEOUT_S
        while "ready on" not in self.log("serve"):
            if self._driver.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"no application:\n{self.log('serve')}\n{self.log('head')}")
            time.sleep(0.1)

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM to ``darkroom serve``; its exit status."""
        assert self._driver is not None
        self._driver.send_signal(signal.SIGTERM)
        return self._driver.wait(timeout_s)

    def end(self) -> None:
        """Kill everything."""
        self._ending.set()
        for machine in (self.head, self.node):
            machine.end()
        if self._keeping.is_alive():
            self._keeping.join()
        for process in self._processes:
            process.wait()
        for log in self._logs:
            log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def log(self, name: str) -> str:
        """What ``head``, ``node`` or ``serve`` has said."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def samples(self, name: str) -> dict[str, float]:
        """A metric's values by their labels, as they are written."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def metric(self, name: str) -> float:
        """The sum of a metric over replicas and labels."""
        return sum(self.samples(name).values())

    # ------------------------------------------------------------------ inside

    def _keep_node(self) -> None:
        while not self._ending.is_set():
            self.node_starts += 1
            self._ray("node", self.node, f"--address={self.head.address}:{GCS_PORT}").wait()
            self._ending.wait(_TRY_AGAIN_S)

    def _ray(self, name: str, machine: Machine, *flags: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).parent / "ray"
        return self._spawn(
            name,
            machine,
            *(str(ray), "start", *flags, f"--node-ip-address={machine.address}", "--block"),
            *("--num-cpus=1", f"--object-store-memory={128 << 20}"),
        )

    def _spawn(self, name: str, machine: Machine, *command: str) -> subprocess.Popen[bytes]:
        log = (self._folder / f"{name}.log").open("ab")
        self._logs.append(log)
        self._processes.append(
            subprocess.Popen(
                [*machine.enter, *command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        )
        return self._processes[-1]


@contextlib.contextmanager
def two_nodes(folder: Path, home: Path, **sections: Any) -> Iterator[Cluster]:
    """The cluster until the block ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with two_machines() as (head, node):
        cluster = Cluster(head, node, folder, home)
        try:
            cluster.start(**sections)
            yield cluster
        finally:
            cluster.end()


def ray_environment() -> dict[str, str]:
    """What ``deploy/cluster/ray.env`` sets."""
    lines = (ROOT / "deploy" / "cluster" / "ray.env").read_text().splitlines()
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    return dict(word.split("=", 1) for word in words)
