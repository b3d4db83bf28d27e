"""What the composed stack must do, asked from outside. Needs only Python.

    docker compose up -d --build --wait && COMPOSE="docker compose" python3 deploy/compose/smoke.py

A picture through the published port; Prometheus has its target; Redis killed and back without a
failed request; the server stopped under load without a lost one. Status 1 when one of them fails.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

SERVER = f"http://127.0.0.1:{os.environ.get('DARKROOM_PUBLISHED_PORT', '8000')}"
PROMETHEUS = f"http://127.0.0.1:{os.environ.get('PROMETHEUS_PUBLISHED_PORT', '9090')}"
NOT_TAKEN_S = 0.1
COMPOSE = os.environ.get("COMPOSE", "docker compose").split()


def main() -> int:
    """Run every check in turn."""
    sizes()
    checks = (picture, prometheus_has_its_target, redis_killed_and_back, stopped_under_load)
    failed = 0
    for check in checks:
        began_s = time.monotonic()
        try:
            told = check()
        except Exception as error:
            failed += 1
            told = f"FAILED: {type(error).__name__}: {error}"
        print(f"{check.__name__}: {told} ({time.monotonic() - began_s:.1f} s)", flush=True)
    return 1 if failed else 0


def sizes() -> None:
    """Images and their sizes."""
    listed = subprocess.run([*COMPOSE, "images"], capture_output=True, text=True, check=True)
    print(listed.stdout, flush=True)


def picture() -> str:
    """One picture, from nothing."""
    wait_until_ready(300)
    status, body = draw("a red apple", steps=20)
    assert status == 200, f"{status}: {body}"
    data = base64.b64decode(body["data"][0]["b64_json"])
    assert data.startswith(b"\x89PNG"), data[:8]
    return f"{len(data)} bytes of PNG"


def prometheus_has_its_target() -> str:
    """The scrape works, not only the process."""
    for _ in range(60):
        with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/targets", timeout=5) as reply:
            targets = json.load(reply)["data"]["activeTargets"]
        states = {target["labels"]["job"]: target["health"] for target in targets}
        if states.get("darkroom") == "up":
            return str(states)
        time.sleep(1)
    raise AssertionError(f"targets: {states}")


def redis_killed_and_back() -> str:
    """Pictures go on without Redis, and with it again."""
    with Load(clients=2) as load:
        time.sleep(3)
        compose("kill", "-s", "SIGKILL", "redis")
        time.sleep(8)
        compose("up", "-d", "--no-deps", "--no-build", "redis")
        time.sleep(8)
    assert load.statuses, "no request was answered"
    assert set(load.statuses) == {200}, f"statuses {sorted(set(load.statuses))}: {load.bad[:3]}"
    return f"{len(load.statuses)} requests, all 200"


def stopped_under_load() -> str:
    """Every request that was taken is answered; later ones are refused, not dropped."""
    with Load(clients=4) as load:
        time.sleep(4)
        compose("stop", "darkroom")
    taken = [status for status in load.statuses if status != 0]
    lost = [what for what in load.bad if what.startswith("lost")]
    assert taken, "no request was answered"
    assert set(taken) <= {200, 503}, f"statuses {sorted(set(taken))}"
    assert not lost, f"{len(lost)} requests were cut off: {lost[:3]}"
    listed = subprocess.run(
        [*COMPOSE, "ps", "-a", "--format", "json", "darkroom"],
        capture_output=True,
        text=True,
        check=True,
    )
    state = json.loads(listed.stdout.splitlines()[0])
    assert state["ExitCode"] == 0, f"exit status {state['ExitCode']}"
    return f"{taken.count(200)} answered, {taken.count(503)} refused, exit status 0"


class Load:
    """Clients that ask for pictures one after the other until the block ends."""

    def __init__(self, clients: int) -> None:
        self.statuses: list[int] = []
        self.bad: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._ended.is_set():
            began_s = time.monotonic()
            try:
                status, body = draw("a cat on a blue background", steps=20)
            except (OSError, ValueError) as error:
                # Docker's proxy takes connections for a port that nobody listens on any more, and
                # resets them at once: such a request was never taken. One that waited was.
                if time.monotonic() - began_s < NOT_TAKEN_S:
                    self.statuses.append(0)
                else:
                    self.bad.append(f"lost: {type(error).__name__}: {error}")
                return
            self.statuses.append(status)
            if status != 200:
                self.bad.append(f"{status}: {body}")
                time.sleep(0.5)


def draw(prompt: str, *, steps: int) -> tuple[int, Any]:
    """(status, body) of one request."""
    request = urllib.request.Request(
        f"{SERVER}/v1/images/generations",
        json.dumps({"prompt": prompt, "steps": steps}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_until_ready(seconds: float) -> None:
    """Until /readyz says so."""
    began_s = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(f"{SERVER}/readyz", timeout=5):
                return
        except OSError as error:
            if time.monotonic() - began_s > seconds:
                raise AssertionError(f"not ready after {seconds:g} s: {error}") from error
            time.sleep(1)


def compose(*arguments: str) -> None:
    """A compose command that has to work."""
    subprocess.run([*COMPOSE, *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
