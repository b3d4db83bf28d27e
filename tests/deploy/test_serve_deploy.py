"""``ray start``, then ``serve deploy``: the commands of deploy/README.md, on one machine."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.faults.cluster import ROOT, ray_environment
from tests.redis_server import free_port
from tests.served import wait_until
from tests.serving import MODEL, pixels

pytestmark = pytest.mark.full

COMMAND_TIMEOUT_S = 180.0
DEPLOYED = ROOT / "deploy" / "cluster" / "serve.yaml"


class Head:
    """The only machine of a Ray cluster, with ports of its own.

    Args:
        folder: for the log; ``DARKROOM_HOME`` too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Ray's sockets need a short path.
        self._scratch = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
        token = Path(self._scratch) / "token"
        token.write_text(secrets.token_hex(32))
        dashboard = free_port()
        self._environment = {
            **os.environ,
            **ray_environment(),
            "DARKROOM_HOME": str(folder),
            "DARKROOM_THREADS": "1",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_TMPDIR": self._scratch,
            "TMPDIR": self._scratch,
        }
        ports = {
            "port": free_port(),
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "metrics-export-port": free_port(),
        }
        self._log = (folder / "ray.log").open("wb")
        self._ray = subprocess.Popen(
            [
                *(_command("ray"), "start", "--head", "--block", "--num-cpus=1"),
                *("--node-ip-address=127.0.0.1", f"--object-store-memory={128 << 20}"),
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            cwd=folder,  # what is deployed is found because it is installed
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )

    def serve(self, *words: str) -> str:
        """Run a command of Serve's own; what it printed."""
        done = subprocess.run(
            [_command("serve"), *words],
            cwd=self._folder,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> bool:
        """Whether Serve can be asked."""
        assert self._ray.poll() is None, (self._folder / "ray.log").read_text(errors="replace")
        with contextlib.suppress(AssertionError):
            self.serve("status")
            return True
        return False

    def end(self) -> None:
        """Kill everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._ray.pid).children(recursive=True)
            self._ray.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10.0)
        self._ray.wait()
        self._log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


@pytest.fixture
def head(plans: Path, tmp_path: Path) -> Iterator[Head]:
    (tmp_path / "plans").symlink_to(plans)
    head = Head(tmp_path)
    try:
        yield head
    finally:
        head.end()


def test_serve_deploy_serves_a_picture_and_takes_another_configuration(
    head: Head, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    config = yaml.safe_load(DEPLOYED.read_text())
    port = free_port()
    args = config["applications"][0]["args"]
    args["models"] = [{"id": MODEL, "path": str(tiny_checkpoint("text"))}]
    args["http"] = {"host": "127.0.0.1", "port": port}
    args["workers"] = {"replicas": 1, "threads": 1}  # this machine has fewer cores
    deployed = tmp_path / "serve.yaml"
    deployed.write_text(yaml.safe_dump(config))
    wait_until(head.up)

    head.serve("deploy", str(deployed))

    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: _status(f"{url}/readyz") == 200, timeout_s=300.0)
    reply = _draw(url, steps=4)
    assert reply.status_code == 200, reply.text
    [picture] = reply.json()["data"]
    assert pixels(base64.b64decode(picture["b64_json"])).size > 0
    running = yaml.safe_load(head.serve("status"))["applications"]["darkroom"]
    assert running["status"] == "RUNNING"
    assert set(running["deployments"]) == {"Gateway", "Router", "Worker"}

    # The same application with another key takes its place.
    args["limits"] = {"max_steps": 3}
    deployed.write_text(yaml.safe_dump(config))
    head.serve("deploy", str(deployed))
    wait_until(lambda: _refuses(url, steps=4), timeout_s=300.0)
    wait_until(lambda: _status(f"{url}/readyz") == 200, timeout_s=300.0)
    assert _draw(url, steps=3).status_code == 200

    head.serve("shutdown", "--yes")
    wait_until(lambda: _status(f"{url}/readyz") is None)


def _draw(url: str, *, steps: int) -> httpx.Response:
    asked = {"prompt": "a red umbrella", "steps": steps, "response_format": "b64_json"}
    return httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60.0)


def _refuses(url: str, *, steps: int) -> bool:
    """Whether a request is one too many steps by now; no gateway may be there for a moment."""
    with contextlib.suppress(httpx.HTTPError):
        return _draw(url, steps=steps).status_code == 400
    return False


def _status(url: str) -> int | None:
    """The status of a reply; None without one."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5.0).status_code
    return None


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)
